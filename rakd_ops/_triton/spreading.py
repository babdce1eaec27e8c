"""Kernel of the backward passes: gradients of maps from those of pooled values.

    gradient[b, c, y, x] = Σ_k factor s_kl Σ_q R_x[q, x] Σ_p R_y[p, y] G[k, l, p, q, c]     over b's boxes k

A program owns a tile of cells and a block of channels. It looks through all boxes for those whose cells meet
the tile, adds them in their order, and writes every element of its tile once, zeros included: no atomics, the
same bits each run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rakd_ops._triton.geometry import pick, weight_row


@triton.jit
def bins_meeting(begins, ends, bins, low, high, BINS: tl.constexpr):
    """First bin, and one past the last, of those whose cells (``begins``..``ends``) meet ``low..high``."""
    first = tl.cast(bins, tl.int32)
    stop = tl.cast(0, tl.int32)
    for base in range(0, bins, BINS):
        p = base + tl.arange(0, BINS)
        begin = tl.load(begins + p, mask=p < bins, other=0)
        end = tl.load(ends + p, mask=p < bins, other=0)
        meets = (begin < high) & (end > low) & (begin < end)
        first = tl.minimum(first, tl.min(tl.where(meets, p, bins), axis=0))
        stop = tl.maximum(stop, tl.max(tl.where(meets, p + 1, 0), axis=0))
    return first, stop


@triton.jit
def add_box(
    total,
    sizes,
    spans,
    weights,
    pooled,
    level,
    k,
    y_low,
    x_low,
    c,
    factor,
    count,
    channels,
    bins_y,
    bins_x,
    LEVELS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    CHANNELS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Add one box to a tile: ``total[x, y, c] += factor Σ_q R_x[q, x] (Σ_p R_y[p, y] pooled[p, q, c])``.

    With ``x`` the slowest axis of the tile, the inner sum lies in the threads that add it to the tile.
    """
    lines = bins_y + bins_x
    begins = spans + (level.to(tl.int64) * count + k) * lines
    ends = begins + tl.cast(LEVELS, tl.int64) * count * lines
    y = y_low + tl.arange(0, TILE_Y)
    x = x_low + tl.arange(0, TILE_X)
    p_first, p_stop = bins_meeting(begins, ends, bins_y, y_low, y_low + TILE_Y, BINS)
    q_first, q_stop = bins_meeting(begins + bins_y, ends + bins_y, bins_x, x_low, x_low + TILE_X, BINS)
    height = pick(sizes, level, 0, 2, LEVELS)
    width = pick(sizes, level, 1, 2, LEVELS)
    y_rows = weights + weight_row(sizes, level, k, 0, count, bins_y, bins_x, LEVELS)
    x_rows = y_rows + tl.cast(bins_y, tl.int64) * height
    for q in range(q_first, q_stop):
        at_x = (x >= tl.load(begins + bins_y + q)) & (x < tl.load(ends + bins_y + q))
        x_weight = tl.load(x_rows + tl.cast(q, tl.int64) * width + x, mask=at_x, other=0.0) * factor
        rows = tl.zeros((TILE_Y, CHANNELS), weights.dtype.element_ty)
        for p in range(p_first, p_stop):
            at_y = (y >= tl.load(begins + p)) & (y < tl.load(ends + p))
            y_weight = tl.load(y_rows + tl.cast(p, tl.int64) * height + y, mask=at_y, other=0.0)
            at = pooled + (tl.cast(p, tl.int64) * bins_x + q) * channels + c
            value = tl.load(at, mask=c < channels, other=0.0).to(weights.dtype.element_ty)
            rows += y_weight[:, None] * value[None, :]
        total += x_weight[:, None, None] * rows[None, :, :]
    return total


@triton.jit
def gather_tiles(
    gradients,
    sizes,
    strides,
    spans,
    extents,
    weights,
    scales,
    images,
    pooled,
    box_step,
    level_step,
    count,
    channels,
    bins_y,
    bins_x,
    factor: tl.float64,
    LEVELS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    CHANNELS: tl.constexpr,
    BINS: tl.constexpr,
    BOXES: tl.constexpr,
):
    """The formula above. ``pooled`` is ``G[p, q, c]`` at ``k box_step + l level_step``, ``s`` is ``scales``.

    Axis 0 of the grid counts the tiles of all levels, the coarsest first: theirs meet the most boxes each.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(2)
    level = tl.cast(0, tl.int32)
    local = tile
    across = tl.cast(1, tl.int32)
    begin = tl.cast(0, tl.int32)
    for other in tl.static_range(LEVELS):
        tiles_x = tl.cdiv(sizes[2 * other + 1], TILE_X)
        tiles = tl.cdiv(sizes[2 * other], TILE_Y) * tiles_x
        here = (tile >= begin) & (tile < begin + tiles)
        level = tl.where(here, other, level)
        local = tl.where(here, tile - begin, local)
        across = tl.where(here, tiles_x, across)
        begin += tiles
    y_low = local // across * TILE_Y
    x_low = local % across * TILE_X

    total = tl.zeros((TILE_X, TILE_Y, CHANNELS), weights.dtype.element_ty)
    source = pooled + level.to(tl.int64) * level_step
    extent = extents + level.to(tl.int64) * count
    axis = tl.cast(LEVELS, tl.int64) * count
    for base in range(0, count, BOXES):
        k = base + tl.arange(0, BOXES)
        inside = k < count
        meets = tl.load(images + k, mask=inside, other=-1) == image
        meets &= tl.load(scales + k.to(tl.int64) * LEVELS + level, mask=inside, other=0.0) != 0.0
        meets &= tl.load(extent + k, mask=inside, other=0) < y_low + TILE_Y
        meets &= tl.load(extent + axis + k, mask=inside, other=0) > y_low
        meets &= tl.load(extent + 2 * axis + k, mask=inside, other=0) < x_low + TILE_X
        meets &= tl.load(extent + 3 * axis + k, mask=inside, other=0) > x_low
        for _ in range(0, tl.sum(meets.to(tl.int32), axis=0)):
            box = tl.min(tl.where(meets, k, count), axis=0)
            meets &= k != box
            box = box.to(tl.int64)
            scale = tl.load(scales + box * LEVELS + level) * factor
            total = add_box(
                total, sizes, spans, weights, source + box * box_step, level, box, y_low, x_low, c,
                scale.to(weights.dtype.element_ty), count, channels, bins_y, bins_x,
                LEVELS, TILE_Y, TILE_X, CHANNELS, BINS
            )  # fmt: skip

    y = y_low + tl.arange(0, TILE_Y)
    x = x_low + tl.arange(0, TILE_X)
    height = pick(sizes, level, 0, 2, LEVELS)
    width = pick(sizes, level, 1, 2, LEVELS)
    start = pick(gradients, level, 0, 1, LEVELS) + image.to(tl.int64) * pick(strides, level, 0, 4, LEVELS)
    at_y = y.to(tl.int64) * pick(strides, level, 2, 4, LEVELS)
    at_x = x.to(tl.int64) * pick(strides, level, 3, 4, LEVELS)
    at_c = c.to(tl.int64) * pick(strides, level, 1, 4, LEVELS)
    in_map = (x < width)[:, None, None] & (y < height)[None, :, None] & (c < channels)[None, None, :]
    target = start + at_x[:, None, None] + at_y[None, :, None] + at_c[None, None, :]
    tl.store(target, total.to(gradients[0].dtype.element_ty), mask=in_map)
