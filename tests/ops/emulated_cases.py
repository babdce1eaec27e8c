"""Inputs and arguments for the tests of the emulated CUDA ops."""

from __future__ import annotations

from typing import Any

import torch
from cases import pyramid, random_boxes
from emulated_ops import OPS
from torch import Tensor

RULE = (0, 1.0, 224.0, 4.0)  # of soft assignment
STRIDES = [4.0, 8.0, 16.0, 32.0]
GEOMETRY = (STRIDES, [3, 2], 2)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], Tensor]:
    maps = pyramid(2, 40, dtype=dtype, requires_grad=True)
    return maps, pyramid(2, 40, dtype=dtype, seed=1), random_boxes(12)


def prepare(boxes: Tensor, images: int = 2, strides: list[float] = STRIDES) -> tuple[Tensor, Tensor]:
    rows: tuple[Tensor, Tensor] = OPS.prepare_boxes([boxes], None, None, images, False, strides, *RULE)
    return rows


def distill_arguments(**changes: Any) -> list[Any]:
    maps, expert, boxes = inputs(torch.float64)
    rows, index = prepare(boxes)
    arguments = {
        "apprentice": [m.detach() for m in maps],
        "expert": expert,
        "rows": rows,
        "index": index,
        "factor": None,
        "strides": STRIDES,
        "expert_strides": STRIDES,
        "output_size": [3, 2],
        "sampling_ratio": 2,
    }
    assert set(changes) <= set(arguments)
    return list({**arguments, **changes}.values())


def without_factor(arguments: list[Any]) -> list[Any]:
    return arguments[:4] + arguments[5:]
