"""What all four ops prepare on the host: checks, level weights, and the rows of RoIAlign's factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rakd_ops._triton import geometry

BOX_BLOCK = 128  # boxes that one step of a search looks at
CELL_BLOCK = 64  # cells whose weights are summed at a time


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on the current stream of the device that its tensors are on."""
    tensor = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(tensor.device if tensor.is_cuda else -1):
        kernel[grid](*arguments, **options)


def check_boxes(boxes: Tensor) -> None:
    """Check the form of boxes, which memory safety rests on; their values may be anything."""
    if boxes.dim() != 2 or boxes.shape[1] != 5 or boxes.dtype != torch.float64 or not boxes.is_contiguous():
        raise ValueError(f"boxes: expected contiguous float64 [K, 5], got {boxes.dtype} {list(boxes.shape)}")


def check_maps(maps: Sequence[Tensor], levels: int) -> None:
    """Check that maps agree as the kernels take for granted."""
    if len(maps) != levels or any(m.dim() != 4 for m in maps):
        raise ValueError(f"maps: expected {levels} of [B, C, H, W], got {[list(m.shape) for m in maps]}")
    if any(m.shape[:2] != maps[0].shape[:2] or m.dtype != maps[0].dtype for m in maps):
        raise ValueError("maps: expected one batch size, number of channels and dtype")


def flat(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Chain tuples: kernels take one entry per level and axis in a row."""
    return tuple(value for row in rows for value in row)


def block_of(size: int, most: int) -> int:
    """Return the smallest block that holds ``size``, up to ``most``."""
    return min(most, int(triton.next_power_of_2(size)))


class Rule(NamedTuple):
    """The level rule, as the ops take it."""

    assignment: int
    sigma: float
    canonical_size: float
    canonical_level: float


class Scales(NamedTuple):
    """What each box counts for on each level, and its image."""

    values: Tensor  # [K, L] float64
    images: Tensor  # [K] int32, -1 for a box of no image

    @classmethod
    def of(
        cls,
        boxes: Tensor,
        coefficients: Tensor | None,
        batch: int,
        strides: Sequence[float],
        rule: Rule,
        factor: float,
    ) -> Scales:
        """Launch ``weigh_levels``; ``factor`` multiplies everything."""
        count, levels = boxes.shape[0], len(strides)
        scales = cls(boxes.new_empty((count, levels)), boxes.new_empty(count, dtype=torch.int32))
        launch(
            geometry.weigh_levels,
            (triton.cdiv(count, BOX_BLOCK),),
            boxes,
            boxes if coefficients is None else coefficients,
            scales.values,
            scales.images,
            count,
            batch,
            factor,
            rule.sigma,
            rule.canonical_size,
            rule.canonical_level,
            LEVEL_OF=tuple(math.log2(stride) for stride in strides),
            LEVELS=levels,
            ASSIGNMENT=rule.assignment,
            WEIGHTED=coefficients is not None,
            BLOCK=BOX_BLOCK,
        )
        return scales


class Bins(NamedTuple):
    """The factors ``R_y`` and ``R_x`` of all boxes on a pyramid's levels; see ``geometry.sample_bins``."""

    spans: Tensor
    extents: Tensor
    cells: Tensor
    weights: Tensor
    sizes: tuple[int, ...]  # height and width of each level
    taps: int

    @classmethod
    def of(
        cls,
        boxes: Tensor,
        shapes: Sequence[Sequence[int]],
        strides: Sequence[float],
        output_size: Sequence[int],
        sampling_ratio: int,
        dtype: torch.dtype,
    ) -> Bins:
        """Launch ``sample_bins``."""
        count, levels = boxes.shape[0], len(strides)
        bins_y, bins_x = output_size
        lines = bins_y + bins_x
        longest = max(max(shape[2:]) for shape in shapes)
        taps = 2 * sampling_ratio if 2 * sampling_ratio < longest else 0
        row = sum(bins_y * shape[2] + bins_x * shape[3] for shape in shapes)
        bins = cls(
            boxes.new_empty((2, levels, count, lines), dtype=torch.int32),
            boxes.new_empty((4, levels, count), dtype=torch.int32),
            boxes.new_empty((levels, count, lines, taps), dtype=torch.int32),
            boxes.new_empty((count, row), dtype=dtype),
            flat([shape[2:] for shape in shapes]),
            taps,
        )
        launch(
            geometry.sample_bins,
            (count, lines, levels),
            boxes,
            bins.spans,
            bins.extents,
            bins.cells,
            bins.weights,
            bins.sizes,
            count,
            bins_y,
            bins_x,
            sampling_ratio,
            SCALES=tuple(1.0 / stride for stride in strides),
            LEVELS=levels,
            TAPS=taps,
            TAP_BLOCK=block_of(max(taps, 1), max(2 * taps, 1)),
            BLOCK=CELL_BLOCK,
            num_warps=1,
            enable_fp_fusion=False,
        )
        return bins


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what maps of a dtype are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
