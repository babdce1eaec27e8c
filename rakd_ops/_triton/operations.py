"""The registered ops on the host: workspaces of static size, and the launches.

Signatures are those of ``rakd_ops._library``. Block sizes are powers of two, as Triton wants; they bound registers, not
the shapes that are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rakd_ops._library import _empty_gradient, _is_channels_last
from rakd_ops._triton import geometry, pooling, spreading

BOX_BLOCK = 128  # boxes that one step of a search looks at
CELL_BLOCK = 64
BIN_BLOCK = 8
POOL_CHANNELS = 64
GATHER_CHANNELS = 64
GATHER_TILE = (4, 8)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on the current stream of the device that its tensors are on."""
    tensor = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(tensor.device if tensor.is_cuda else -1):
        kernel[grid](*arguments, **options)


def flat(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(value for row in rows for value in row)


def block_of(size: int, most: int) -> int:
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
        """Launch ``weigh_levels``."""
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
    """The factors ``R_y`` and ``R_x`` of all boxes on the levels of one pyramid; see ``geometry.sample_bins``."""

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
    return torch.float64 if dtype == torch.float64 else torch.float32


def map_strides(maps: Sequence[Tensor]) -> tuple[int, ...]:
    return flat([feature.stride() for feature in maps])


def gather(
    gradients: list[Tensor],
    bins: Bins,
    scales: Scales,
    pooled: Tensor,
    steps: tuple[int, int],
    output_size: Sequence[int],
    factor: int,
) -> None:
    """Launch ``gather_tiles``, which fills the gradients."""
    batch, channels = gradients[0].shape[:2]
    if batch == 0:
        return
    tile_y, tile_x = GATHER_TILE
    tiles = sum(triton.cdiv(g.shape[2], tile_y) * triton.cdiv(g.shape[3], tile_x) for g in gradients)
    block = block_of(channels, GATHER_CHANNELS)
    launch(
        spreading.gather_tiles,
        (tiles, triton.cdiv(channels, block), batch),
        tuple(gradients),
        bins.sizes,
        map_strides(gradients),
        bins.spans,
        bins.extents,
        bins.weights,
        scales.values,
        scales.images,
        pooled,
        *steps,
        scales.images.shape[0],
        channels,
        *output_size,
        LEVELS=len(gradients),
        FACTOR=factor,
        TILE_Y=tile_y,
        TILE_X=tile_x,
        CHANNELS=block,
        BINS=block_of(max(output_size), BOX_BLOCK),
        BOXES=BOX_BLOCK,
    )


def distill(
    apprentice: list[Tensor],
    expert: list[Tensor],
    boxes: Tensor,
    coefficients: Tensor,
    strides: list[float],
    expert_strides: list[float],
    output_size: list[int],
    sampling_ratio: int,
    rule: Rule,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Total, losses per box, and the gradients of the total with respect to the sides that are wanted."""
    first = apprentice[0]
    batch, channels = first.shape[:2]
    count, levels = boxes.shape[0], len(strides)
    dtype = accumulation_dtype(first.dtype)
    sides = [maps for maps, side in zip((apprentice, expert), wanted, strict=True) if side]
    gradients = [_empty_gradient(m, m.shape, _is_channels_last(m)) for maps in sides for m in maps]
    if count == 0:
        return boxes.new_zeros(()), boxes.new_zeros(0), [g.zero_() for g in gradients]

    bins_y, bins_x = output_size
    scales = Scales.of(boxes, coefficients, batch, strides, rule, 1.0 / (channels * bins_y * bins_x))
    shapes = [[m.shape for m in maps] for maps in (apprentice, expert)]
    shared = shapes[0] == shapes[1] and strides == expert_strides
    bins = Bins.of(boxes, shapes[0], strides, output_size, sampling_ratio, dtype)
    expert_bins = bins if shared else Bins.of(boxes, shapes[1], expert_strides, output_size, sampling_ratio, dtype)
    block = block_of(channels, POOL_CHANNELS)
    channel_blocks = triton.cdiv(channels, block)
    keep = any(wanted)
    pooled = boxes.new_empty((count, levels, bins_y, bins_x, channels) if keep else 1, dtype=dtype)
    parts = boxes.new_empty((count, levels * bins_y * channel_blocks))
    launch(
        pooling.distill_rows,
        (count * channel_blocks, bins_y, levels),
        tuple(apprentice),
        tuple(expert),
        bins.sizes,
        expert_bins.sizes,
        map_strides(apprentice),
        map_strides(expert),
        bins.spans,
        bins.cells,
        bins.weights,
        expert_bins.spans,
        expert_bins.cells,
        expert_bins.weights,
        scales.values,
        scales.images,
        pooled,
        parts,
        count,
        channels,
        channel_blocks,
        bins_y,
        bins_x,
        LEVELS=levels,
        TAPS=bins.taps,
        EXPERT_TAPS=expert_bins.taps,
        SHARED=shared,
        KEEP=keep,
        CHANNELS_LAST=first.stride(1) == 1,
        BINS=block_of(bins_x, BIN_BLOCK),
        CHANNELS=block,
    )
    per_level = bins_y * bins_x * channels
    remaining = gradients
    for side, side_bins, factor in ((0, bins, 2), (1, expert_bins, -2)):
        if wanted[side]:
            own, remaining = remaining[:levels], remaining[levels:]
            gather(own, side_bins, scales, pooled, (levels * per_level, per_level), output_size, factor)
    losses = parts.sum(dim=1)
    return losses.sum(), losses, gradients


def distill_loss(
    apprentice: list[Tensor],
    expert: list[Tensor],
    boxes: Tensor,
    coefficients: Tensor,
    strides: list[float],
    expert_strides: list[float],
    output_size: list[int],
    sampling_ratio: int,
    *rule: Any,
) -> tuple[Tensor, Tensor]:
    """See ``rakd_ops._library``."""
    total, losses, _ = distill(
        apprentice, expert, boxes, coefficients, strides, expert_strides, output_size, sampling_ratio, Rule(*rule),
        (False, False),
    )  # fmt: skip
    return total, losses


def distill_gradient(
    apprentice: list[Tensor],
    expert: list[Tensor],
    boxes: Tensor,
    coefficients: Tensor,
    strides: list[float],
    expert_strides: list[float],
    output_size: list[int],
    sampling_ratio: int,
    *options: Any,
) -> tuple[Tensor, list[Tensor]]:
    """See ``rakd_ops._library``."""
    *rule, apprentice_gradient, expert_gradient = options
    total, _, gradients = distill(
        apprentice, expert, boxes, coefficients, strides, expert_strides, output_size, sampling_ratio, Rule(*rule),
        (apprentice_gradient, expert_gradient),
    )  # fmt: skip
    return total, gradients


def align(
    features: list[Tensor],
    boxes: Tensor,
    strides: list[float],
    output_size: list[int],
    sampling_ratio: int,
    *rule: Any,
) -> Tensor:
    """See ``rakd_ops._library``."""
    first = features[0]
    batch, channels = first.shape[:2]
    count, levels = boxes.shape[0], len(strides)
    output = first.new_empty((count, channels, *output_size))
    if count == 0:
        return output
    scales = Scales.of(boxes, None, batch, strides, Rule(*rule), 1.0)
    shapes = [m.shape for m in features]
    bins = Bins.of(boxes, shapes, strides, output_size, sampling_ratio, accumulation_dtype(first.dtype))
    block = block_of(channels, POOL_CHANNELS)
    channel_blocks = triton.cdiv(channels, block)
    launch(
        pooling.align_rows,
        (count * channel_blocks, output_size[0]),
        tuple(features),
        bins.sizes,
        map_strides(features),
        bins.spans,
        bins.cells,
        bins.weights,
        scales.values,
        scales.images,
        output,
        count,
        channels,
        channel_blocks,
        *output_size,
        LEVELS=levels,
        TAPS=bins.taps,
        CHANNELS_LAST=first.stride(1) == 1,
        BINS=block_of(output_size[1], BIN_BLOCK),
        CHANNELS=block,
    )
    return output


def align_backward(
    output_gradient: Tensor,
    boxes: Tensor,
    shapes: list[int],
    channels_last: list[bool],
    strides: list[float],
    output_size: list[int],
    sampling_ratio: int,
    *rule: Any,
) -> list[Tensor]:
    """See ``rakd_ops._library``."""
    maps = [shapes[4 * level : 4 * level + 4] for level in range(len(strides))]
    gradients = [
        _empty_gradient(output_gradient, shape, last) for shape, last in zip(maps, channels_last, strict=True)
    ]
    if boxes.shape[0] == 0:
        return [g.zero_() for g in gradients]
    scales = Scales.of(boxes, None, maps[0][0], strides, Rule(*rule), 1.0)
    dtype = accumulation_dtype(output_gradient.dtype)
    bins = Bins.of(boxes, maps, strides, output_size, sampling_ratio, dtype)
    pooled = output_gradient.permute(0, 2, 3, 1).contiguous()  # neighbouring threads take neighbouring channels
    gather(gradients, bins, scales, pooled, (pooled.stride(0), 0), output_size, 1)
    return gradients
