"""Validation: brings the arguments of the public functions into one form, or says what is wrong with which.

Values are only looked at where that costs no device synchronisation: boxes and weights on the CPU, outside
``torch.compile``. The kernels themselves stay in bounds for any values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rakd_ops.levels import ASSIGNMENTS

REDUCTIONS = ("mean", "sum", "none")
MAP_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_LEVELS = 16  # csrc/geometry.h, kMaxLevels
MAX_COUNT = 10_000  # bins and samples along one axis; kernels count in 32 bits
MAX_CELLS = 2**31 - 2  # rows or columns of one map; likewise

Maps = Sequence[Tensor] | Mapping[str, Tensor]
Boxes = Tensor | Sequence[Tensor]


class Settings(NamedTuple):
    """Options of an op, checked; a plain tuple, so that ``torch.compile`` can look through it."""

    strides: tuple[float, ...]
    output_size: tuple[int, int]
    sampling_ratio: int
    assignment: str
    sigma: float
    canonical_size: float
    canonical_level: float

    def for_op(self) -> tuple[list[int], int, int, float, float, float]:
        """Return the trailing arguments that all registered ops share."""
        return (
            list(self.output_size),
            self.sampling_ratio,
            ASSIGNMENTS.index(self.assignment),
            self.sigma,
            self.canonical_size,
            self.canonical_level,
        )


def check_number(name: str, value: Any, *, positive: bool = False) -> float:
    """Return ``value`` as a finite float, positive where asked."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or (positive and number <= 0):
        raise ValueError(f"{name}: expected a {'positive ' if positive else ''}finite number, got {value!r}")
    return number


def check_integer(name: str, value: Any, minimum: int) -> int:
    """Return ``value`` as an int from ``minimum`` to ``MAX_COUNT``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    number = int(value)
    if number < minimum:
        raise ValueError(f"{name}: expected an integer of at least {minimum}, got {number}")
    if number > MAX_COUNT:
        raise ValueError(f"{name}: expected an integer of at most {MAX_COUNT}, got {number}")
    return number


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_strides(name: str, strides: Any) -> tuple[float, ...]:
    """Return strides as floats; they must be positive and increase (fine to coarse)."""
    if isinstance(strides, (str, bytes)) or not isinstance(strides, Sequence):
        raise TypeError(f"{name}: expected a sequence of numbers, got {type(strides).__name__}")
    if not 1 <= len(strides) <= MAX_LEVELS:
        raise ValueError(f"{name}: expected 1 to {MAX_LEVELS} strides, got {len(strides)}")
    checked = tuple(check_number(f"{name}[{i}]", stride, positive=True) for i, stride in enumerate(strides))
    if any(fine >= coarse for fine, coarse in pairwise(checked)):
        raise ValueError(f"{name}: expected increasing strides (fine to coarse), got {checked}")
    return checked


def check_expert_strides(strides: Any, levels: int) -> tuple[float, ...]:
    """Return the expert's strides as floats; one per level."""
    steps = check_strides("expert_strides", strides)
    if len(steps) != levels:
        raise ValueError(f"expert_strides: expected {levels} strides as in strides, got {len(steps)}")
    return steps


def check_settings(
    strides: Any,
    output_size: Any,
    sampling_ratio: Any,
    assignment: Any,
    sigma: Any,
    canonical_size: Any,
    canonical_level: Any,
) -> Settings:
    """Check all options that do not depend on tensors."""
    if isinstance(output_size, Sequence) and not isinstance(output_size, str):
        if len(output_size) != 2:
            raise ValueError(f"output_size: expected one integer or two (height, width), got {output_size!r}")
        size = (
            check_integer("output_size[0]", output_size[0], 1),
            check_integer("output_size[1]", output_size[1], 1),
        )
    else:
        size = (check_integer("output_size", output_size, 1),) * 2
    return Settings(
        check_strides("strides", strides),
        size,
        check_integer("sampling_ratio", sampling_ratio, 0),
        check_choice("assignment", assignment, ASSIGNMENTS),
        check_number("sigma", sigma, positive=True),
        check_number("canonical_size", canonical_size, positive=True),
        check_number("canonical_level", canonical_level),
    )


def list_maps(name: str, maps: Any, keys: Sequence[str] | None = None) -> list[Tensor]:
    """Return maps as a list, fine to coarse; a dict's values in the order of ``keys`` or else its own."""
    if isinstance(maps, Mapping):
        if keys is not None and set(keys) != set(maps):
            raise ValueError(f"{name}: expected the maps {list(keys)} as in apprentice, got {list(maps)}")
        maps = [maps[key] for key in (keys if keys is not None else maps)]
    elif isinstance(maps, Tensor) or not isinstance(maps, Sequence):
        raise TypeError(f"{name}: expected a sequence or dict of maps, got {type(maps).__name__}")
    for i, feature in enumerate(maps):
        if not isinstance(feature, Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(feature).__name__}")
    return list(maps)


def check_maps(name: str, maps: list[Tensor], like: Tensor, like_name: str, levels: int) -> None:
    """Check number, rank, batch size, channels, dtype and device of maps against the map ``like``."""
    if len(maps) != levels:
        raise ValueError(f"{name}: expected {levels} maps, one per stride, got {len(maps)}")
    for i, feature in enumerate(maps):
        label = f"{name}[{i}]"
        if feature.dim() != 4:
            raise ValueError(f"{label}: expected shape [B, C, H, W], got {list(feature.shape)}")
        if feature.dtype not in MAP_DTYPES:
            raise TypeError(f"{label}: expected float32, float64, float16 or bfloat16, got {feature.dtype}")
        if min(feature.shape[1:]) == 0:
            raise ValueError(f"{label}: expected at least one channel, row and column, got {list(feature.shape)}")
        if max(feature.shape[2:]) > MAX_CELLS:
            raise ValueError(f"{label}: expected at most {MAX_CELLS} rows and columns, got {list(feature.shape)}")
        for axis, what in ((0, "images"), (1, "channels")):
            if feature.shape[axis] != like.shape[axis]:
                expected = f"{like.shape[axis]} {what} as in {like_name}"
                raise ValueError(f"{label}: expected {expected}, got shape {list(feature.shape)}")
        if feature.dtype != like.dtype:
            raise TypeError(f"{label}: expected {like.dtype} as in {like_name}, got {feature.dtype}")
        if feature.device != like.device:
            raise ValueError(f"{label}: expected device {like.device} as in {like_name}, got {feature.device}")


def check_pyramid(groups: Sequence[tuple[str, str, list[Tensor], tuple[float, ...]]]) -> None:
    """Check that maps fit their strides: all sizes times strides must belong to one image.

    A map of ``n`` cells of stride ``s`` comes from more than ``(n - 1) s`` and less than ``(n + 1) s`` pixels,
    whatever mixture of rounding up and down its network uses. Two networks may pad differently, by up to the
    coarsest stride.

    Args:
        groups: Per network: name of its strides' argument, name of its maps' argument, maps, strides.
    """
    for axis, what in ((2, "heights"), (3, "widths")):
        intervals = []
        for _, _, maps, strides in groups:
            sizes = [int(feature.shape[axis]) for feature in maps]
            low = max((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
            intervals.append((low, min((n + 1) * stride for n, stride in zip(sizes, strides, strict=True))))
        padding = max(strides[-1] for _, _, _, strides in groups) if len(groups) > 1 else 0.0
        consistent = max(low for low, _ in intervals) < min(high for _, high in intervals) + padding
        for (argument, _, _, _), (low, high) in zip(reversed(groups), reversed(intervals), strict=True):
            if low >= high or not consistent:
                listed = "; ".join(
                    f"{name} {[int(m.shape[axis]) for m in maps]} at strides {list(strides)}"
                    for _, name, maps, strides in groups
                )
                raise ValueError(
                    f"{argument}: expected strides that fit the maps' {what} (size times stride about the same for "
                    f"all maps), got {listed}"
                )


def list_boxes(boxes: Any, like: Tensor) -> Tensor:
    """Return boxes as float64 ``[K, 5]`` on the maps' device, checked as far as that needs no synchronisation."""
    if isinstance(boxes, Sequence) and not isinstance(boxes, (str, bytes)):
        if len(boxes) != like.shape[0]:
            raise ValueError(f"boxes: expected {like.shape[0]} tensors, one per image, got {len(boxes)}")
        for i, rows in enumerate(boxes):
            _check_box_tensor(f"boxes[{i}]", rows, 4, like.device)
        indexed = [
            torch.cat([rows.new_full((rows.shape[0], 1), i, dtype=torch.float64), rows.to(torch.float64)], dim=1)
            for i, rows in enumerate(boxes)
        ]
        boxes = torch.cat(indexed) if indexed else like.new_empty((0, 5), dtype=torch.float64)
    else:
        _check_box_tensor("boxes", boxes, 5, like.device)
        boxes = boxes.detach().to(torch.float64)
    if boxes.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_box_values(boxes, like.shape[0])
    checked: Tensor = boxes.detach().contiguous()
    return checked


def _check_box_tensor(name: str, boxes: Any, columns: int, device: torch.device | None) -> None:
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(boxes).__name__}")
    layout = "(batch_index, x1, y1, x2, y2)" if columns == 5 else "(x1, y1, x2, y2)"
    if boxes.dim() != 2 or boxes.shape[1] != columns:
        raise ValueError(f"{name}: expected shape [K, {columns}], {layout}, got {list(boxes.shape)}")
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {boxes.dtype}")
    if device is not None and boxes.device != device:
        raise ValueError(f"{name}: expected device {device} as the maps, got {boxes.device}")
    if boxes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected boxes that need no gradient (they are data; detach them), got requires_grad"
        )


def _check_box_values(boxes: Tensor, images: int | None) -> None:
    finite = boxes.isfinite().all(dim=1)
    if not finite.all():
        _refuse_box(boxes, ~finite, "finite numbers")
    index = boxes[:, 0]
    whole = index == index.floor()
    if not whole.all():
        _refuse_box(boxes, ~whole, "whole batch indices")
    inside = (index >= 0) & (index < (math.inf if images is None else images))
    if not inside.all():
        _refuse_box(boxes, ~inside, f"batch indices from 0 to {'' if images is None else images - 1}")
    ordered = (boxes[:, 1] <= boxes[:, 3]) & (boxes[:, 2] <= boxes[:, 4])
    if not ordered.all():
        _refuse_box(boxes, ~ordered, "x1 <= x2 and y1 <= y2")


def _refuse_box(boxes: Tensor, wrong: Tensor, expected: str) -> None:
    row = int(wrong.nonzero()[0])
    raise ValueError(f"boxes: expected {expected}, got {boxes[row].tolist()} in row {row}")


def list_boxes_alone(boxes: Any) -> Tensor:
    """Return boxes as float64 ``[K, 5]`` where there are no maps to compare with."""
    if isinstance(boxes, Sequence) and not isinstance(boxes, (str, bytes)) and boxes:
        _check_box_tensor("boxes[0]", boxes[0], 4, None)
        return list_boxes(boxes, torch.empty((len(boxes), 1), device=boxes[0].device))
    _check_box_tensor("boxes", boxes, 5, None)
    boxes = boxes.detach().to(torch.float64)
    if boxes.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_box_values(boxes, None)
    rows: Tensor = boxes.contiguous()
    return rows


def box_coefficients(box_weights: Any, boxes: Tensor, reduction: str) -> Tensor:
    """Return what each box's loss is multiplied with, float64 ``[K]``: its weight, over K for ``"mean"``."""
    count = boxes.shape[0]
    if box_weights is None:
        weights = boxes.new_ones(count)
    else:
        if not isinstance(box_weights, Tensor):
            raise TypeError(f"box_weights: expected a tensor, got {type(box_weights).__name__}")
        if box_weights.dim() != 1 or box_weights.shape[0] != count:
            raise ValueError(f"box_weights: expected shape [{count}], one per box, got {list(box_weights.shape)}")
        if box_weights.is_complex():
            raise TypeError(f"box_weights: expected real numbers, got {box_weights.dtype}")
        if box_weights.device != boxes.device:
            raise ValueError(f"box_weights: expected device {boxes.device} as the boxes, got {box_weights.device}")
        if box_weights.requires_grad and torch.is_grad_enabled():
            raise ValueError("box_weights: expected weights that need no gradient (detach them), got requires_grad")
        weights = box_weights.detach().to(torch.float64).contiguous()
        on_host = weights.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and not weights.isfinite().all():
            row = int((~weights.isfinite()).nonzero()[0])
            raise ValueError(f"box_weights: expected finite numbers, got {float(weights[row])} in row {row}")
    return weights / max(count, 1) if reduction == "mean" else weights


class Distillation(NamedTuple):
    """Checked inputs of ``soft_roi_distill``."""

    apprentice: list[Tensor]
    expert: list[Tensor]
    boxes: Tensor
    coefficients: Tensor
    expert_strides: tuple[float, ...]


def check_distillation(
    apprentice: Any,
    expert: Any,
    boxes: Any,
    box_weights: Any,
    reduction: Any,
    settings: Settings,
    expert_strides: Any,
) -> Distillation:
    """Check the tensors of ``soft_roi_distill`` and bring them into one form."""
    check_choice("reduction", reduction, REDUCTIONS)
    keys = list(apprentice) if isinstance(apprentice, Mapping) else None
    students = list_maps("apprentice", apprentice)
    teachers = list_maps("expert", expert, keys)
    levels = len(settings.strides)
    steps = settings.strides if expert_strides is None else check_expert_strides(expert_strides, levels)
    if len(students) != levels:
        raise ValueError(f"apprentice: expected {levels} maps, one per stride, got {len(students)}")
    both = harmonise_autocast(students + teachers)
    students, teachers = both[: len(students)], both[len(students) :]
    check_maps("apprentice", students, students[0], "apprentice[0]", levels)
    check_maps("expert", teachers, students[0], "apprentice[0]", levels)
    check_pyramid(
        [
            ("strides", "apprentice", students, settings.strides),
            ("expert_strides", "expert", teachers, steps),
        ]
    )
    rows = list_boxes(boxes, students[0])
    return Distillation(students, teachers, rows, box_coefficients(box_weights, rows, reduction), steps)


def check_alignment(features: Any, boxes: Any, settings: Settings) -> tuple[list[Tensor], Tensor]:
    """Check the tensors of ``multilevel_roi_align`` and bring them into one form."""
    maps = list_maps("features", features)
    if len(maps) != len(settings.strides):
        raise ValueError(f"features: expected {len(settings.strides)} maps, one per stride, got {len(maps)}")
    maps = harmonise_autocast(maps)
    check_maps("features", maps, maps[0], "features[0]", len(settings.strides))
    check_pyramid([("strides", "features", maps, settings.strides)])
    return maps, list_boxes(boxes, maps[0])


def harmonise_autocast(maps: list[Tensor]) -> list[Tensor]:
    """Under autocast, bring maps of mixed float dtypes to float32; elsewhere a mixture is the caller's error.

    The ops accumulate in float32 whatever they are given, so maps of one dtype stay as they are.
    """
    dtypes = {feature.dtype for feature in maps}
    if len(dtypes) == 1 or not dtypes <= set(MAP_DTYPES):
        return maps
    if not torch.is_autocast_enabled(maps[0].device.type):
        return maps
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    return [feature.to(widest) for feature in maps]
