"""The registered ops on the host: workspaces of static size, and the launches.

Signatures are those of ``rakd_ops._library``. Block sizes are powers of two, as Triton wants; they bound
registers, not the shapes that are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from rakd_ops._library import _empty_gradient, _is_channels_last
from rakd_ops._triton import pooling, preparation, spreading
from rakd_ops._triton.preparation import (
    Bins,
    Rule,
    Scales,
    accumulation_dtype,
    block_of,
    check_boxes,
    check_maps,
    flat,
)

BIN_BLOCK = 8  # bins and channels that are pooled together
POOL_CHANNELS = 64
GATHER_TILE = (4, 8)  # cells and channels of a gradient that one program owns
GATHER_CHANNELS = 64


def map_strides(maps: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the strides of all maps, in elements, four per level."""
    return flat([feature.stride() for feature in maps])


def gather(
    gradients: list[Tensor],
    bins: Bins,
    scales: Scales,
    pooled: Tensor,
    steps: tuple[int, int],
    output_size: Sequence[int],
    factor: float,
) -> None:
    """Launch ``gather_tiles``, which fills the gradients; ``pooled`` lies at steps per (box, level)."""
    batch, channels = gradients[0].shape[:2]
    if batch == 0:
        return
    tile_y, tile_x = GATHER_TILE
    tiles = sum(triton.cdiv(g.shape[2], tile_y) * triton.cdiv(g.shape[3], tile_x) for g in gradients)
    block = block_of(channels, GATHER_CHANNELS)
    preparation.launch(
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
        factor,
        LEVELS=len(gradients),
        TILE_Y=tile_y,
        TILE_X=tile_x,
        CHANNELS=block,
        BINS=block_of(max(output_size), preparation.BOX_BLOCK),
        BOXES=preparation.BOX_BLOCK,
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
    check_boxes(boxes)
    check_maps(apprentice + expert, 2 * levels)
    if coefficients.shape != (count,) or coefficients.dtype != torch.float64:
        raise ValueError(f"coefficients: expected float64 [{count}], got {list(coefficients.shape)}")
    coefficients = coefficients.contiguous()
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
    expert_bins = bins
    if not shared:
        expert_bins = Bins.of(boxes, shapes[1], expert_strides, output_size, sampling_ratio, dtype)
    block = block_of(channels, POOL_CHANNELS)
    channel_blocks = triton.cdiv(channels, block)
    keep = any(wanted)
    pooled = boxes.new_empty((count, levels, bins_y, bins_x, channels) if keep else 1, dtype=dtype)
    parts = boxes.new_empty((count, levels * bins_y * channel_blocks))
    preparation.launch(
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
    for side, side_bins, factor in ((0, bins, 2.0), (1, expert_bins, -2.0)):
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
        apprentice, expert, boxes, coefficients, strides, expert_strides, output_size, sampling_ratio,
        Rule(*rule), (False, False),
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
        apprentice, expert, boxes, coefficients, strides, expert_strides, output_size, sampling_ratio,
        Rule(*rule), (apprentice_gradient, expert_gradient),
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
    check_boxes(boxes)
    check_maps(features, levels)
    output = first.new_empty((count, channels, *output_size))
    if count == 0:
        return output
    scales = Scales.of(boxes, None, batch, strides, Rule(*rule), 1.0)
    shapes = [m.shape for m in features]
    bins = Bins.of(boxes, shapes, strides, output_size, sampling_ratio, accumulation_dtype(first.dtype))
    block = block_of(channels, POOL_CHANNELS)
    channel_blocks = triton.cdiv(channels, block)
    preparation.launch(
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
    check_boxes(boxes)
    maps = [shapes[4 * level : 4 * level + 4] for level in range(len(strides))]
    gradients = [_empty_gradient(output_gradient, shape, last) for shape, last in zip(maps, channels_last, strict=True)]
    if boxes.shape[0] == 0:
        return [g.zero_() for g in gradients]
    scales = Scales.of(boxes, None, maps[0][0], strides, Rule(*rule), 1.0)
    dtype = accumulation_dtype(output_gradient.dtype)
    bins = Bins.of(boxes, maps, strides, output_size, sampling_ratio, dtype)
    pooled = output_gradient.permute(0, 2, 3, 1).contiguous()  # neighbouring threads: neighbouring channels
    gather(gradients, bins, scales, pooled, (pooled.stride(0), 0), output_size, 1.0)
    return gradients
