"""Kernels of the forward passes: pooled differences with their losses, and pooled features.

For box ``k``, level ``l``, bins ``(p, q)`` and channel ``c`` a map ``F`` is pooled as

    pool(F) = Σ_y R_y[p, y] Σ_x R_x[q, x] F[c, y, x]

over the few cells where ``R`` is not zero. A program owns one row ``p`` of bins and a block of channels, and
sums in a fixed order, so results have the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rakd_ops._triton.geometry import pick, weight_row


@triton.jit
def spread_out(vector, CHANNELS_LAST: tl.constexpr):
    """Lay a vector of bins along its axis of a tile: [bins, channels] for channels-last maps, else turned.

    Neighbouring threads then read neighbouring channels, or cells of one row.
    """
    return tl.expand_dims(vector, 1 if CHANNELS_LAST else 0)


@triton.jit
def pool_row(
    maps,
    others,
    sizes,
    map_strides,
    other_strides,
    spans,
    cells,
    weights,
    level,
    k,
    image,
    p,
    q,
    c,
    count,
    channels,
    bins_y,
    bins_x,
    LEVELS: tl.constexpr,
    TAPS: tl.constexpr,
    PAIRED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Pool bins ``(p, q)`` of one box from one level: ``pool(map - other)`` where PAIRED, else ``pool(map)``.

    ``q`` is a block of bins, ``c`` a block of channels, shaped to broadcast to the tile that is returned. A
    bin either spans its cells without gaps or, where they are more than TAPS (twice the sampling ratio),
    lists them.
    """
    lines = bins_y + bins_x
    line = bins_y + q
    valid = q < bins_x
    slot = (level.to(tl.int64) * count + k) * lines
    ends = spans + tl.cast(LEVELS, tl.int64) * count * lines
    y_first = tl.load(spans + slot + p)
    y_count = tl.load(ends + slot + p) - y_first
    x_first = tl.load(spans + slot + line, mask=valid, other=0)
    x_count = tl.load(ends + slot + line, mask=valid, other=0) - x_first
    if TAPS > 0:
        y_listed = y_count > TAPS
        x_listed = x_count > TAPS
        y_count = tl.minimum(y_count, TAPS)
        x_count = tl.minimum(x_count, TAPS)
    columns = tl.max(x_count, axis=0)
    y_row = weights + weight_row(sizes, level, k, p, count, bins_y, bins_x, LEVELS)
    x_row = weights + weight_row(sizes, level, k, line, count, bins_y, bins_x, LEVELS)
    source = pick(maps, level, 0, 1, LEVELS) + image * pick(map_strides, level, 0, 4, LEVELS)
    source += c.to(tl.int64) * pick(map_strides, level, 1, 4, LEVELS)
    step_y = pick(map_strides, level, 2, 4, LEVELS)
    step_x = pick(map_strides, level, 3, 4, LEVELS)
    if PAIRED:
        other_source = pick(others, level, 0, 1, LEVELS) + image * pick(other_strides, level, 0, 4, LEVELS)
        other_source += c.to(tl.int64) * pick(other_strides, level, 1, 4, LEVELS)
        other_step_y = pick(other_strides, level, 2, 4, LEVELS)
        other_step_x = pick(other_strides, level, 3, 4, LEVELS)

    total = tl.zeros_like(spread_out(q, CHANNELS_LAST) + c).to(weights.dtype.element_ty)
    for i in range(0, y_count):
        y = tl.cast(y_first + i, tl.int64)
        if TAPS > 0:
            y = tl.load(cells + (slot + p) * TAPS + i, mask=y_listed, other=y.to(tl.int32)).to(tl.int64)
        y_weight = tl.load(y_row + y, mask=y >= 0, other=0.0)
        if y_weight != 0.0:
            for j in range(0, columns):
                live = j < x_count
                x = x_first + j
                if TAPS > 0:
                    x = tl.load(cells + (slot + line) * TAPS + j, mask=live & x_listed, other=x)
                    live = live & (x >= 0)
                x_weight = tl.load(x_row + x, mask=live, other=0.0)
                column = spread_out(x.to(tl.int64), CHANNELS_LAST)
                reads = spread_out(x_weight != 0.0, CHANNELS_LAST) & (c < channels)
                value = tl.load(source + y * step_y + column * step_x, mask=reads, other=0.0)
                value = value.to(weights.dtype.element_ty)
                if PAIRED:
                    place = other_source + y * other_step_y + column * other_step_x
                    value -= tl.load(place, mask=reads, other=0.0).to(weights.dtype.element_ty)
                total += spread_out(y_weight * x_weight, CHANNELS_LAST) * value
    return total


@triton.jit
def distill_rows(
    apprentice,
    expert,
    sizes,
    expert_sizes,
    apprentice_strides,
    expert_strides,
    spans,
    cells,
    weights,
    expert_spans,
    expert_cells,
    expert_weights,
    scales,
    images,
    pooled,
    losses,
    count,
    channels,
    channel_blocks,
    bins_y,
    bins_x,
    LEVELS: tl.constexpr,
    TAPS: tl.constexpr,
    EXPERT_TAPS: tl.constexpr,
    SHARED: tl.constexpr,
    KEEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``D = pool(A) - pool(E)`` and its part of the loss, ``scales[k, l] Σ D²``, one number per program.

    SHARED: both pyramids have one geometry, so the difference is taken at load. KEEP: write ``D`` to
    ``pooled[k, l, p, q, c]`` for the gradient; nothing is written where the scale is zero, nor read later.
    """
    program = tl.program_id(0)
    k = (program // channel_blocks).to(tl.int64)
    block = program % channel_blocks
    p = tl.program_id(1)
    level = tl.program_id(2)
    c = tl.expand_dims(block * CHANNELS + tl.arange(0, CHANNELS), 0 if CHANNELS_LAST else 1)
    scale = tl.load(scales + k * LEVELS + level)
    image = tl.load(images + k).to(tl.int64)
    squares = tl.zeros((), weights.dtype.element_ty)
    if scale != 0.0:
        for base in range(0, bins_x, BINS):
            q = base + tl.arange(0, BINS)
            difference = pool_row(
                apprentice, expert, sizes, apprentice_strides, expert_strides, spans, cells, weights, level,
                k, image, p, q, c, count, channels, bins_y, bins_x, LEVELS, TAPS, SHARED, CHANNELS_LAST
            )  # fmt: skip
            if not SHARED:
                difference -= pool_row(
                    expert, expert, expert_sizes, expert_strides, expert_strides, expert_spans, expert_cells,
                    expert_weights, level, k, image, p, q, c, count, channels, bins_y, bins_x, LEVELS,
                    EXPERT_TAPS, False, CHANNELS_LAST
                )  # fmt: skip
            squares += tl.sum(difference * difference)
            if KEEP:
                at = ((k * LEVELS + level) * bins_y + p) * bins_x + spread_out(q.to(tl.int64), CHANNELS_LAST)
                inside = spread_out(q < bins_x, CHANNELS_LAST) & (c < channels)
                tl.store(pooled + at * channels + c, difference, mask=inside)
    at = ((k * LEVELS + level) * bins_y + p) * channel_blocks + block
    tl.store(losses + at, squares.to(tl.float64) * scale)


@triton.jit
def align_rows(
    features,
    sizes,
    strides,
    spans,
    cells,
    weights,
    scales,
    images,
    output,
    count,
    channels,
    channel_blocks,
    bins_y,
    bins_x,
    LEVELS: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``output[k, c, p, q] = Σ_l w_kl pool(F_l)``, with the weights ``w_kl`` in ``scales``."""
    program = tl.program_id(0)
    k = (program // channel_blocks).to(tl.int64)
    block = program % channel_blocks
    p = tl.program_id(1)
    c = tl.expand_dims(block * CHANNELS + tl.arange(0, CHANNELS), 0 if CHANNELS_LAST else 1)
    image = tl.load(images + k).to(tl.int64)
    for base in range(0, bins_x, BINS):
        q = base + tl.arange(0, BINS)
        total = tl.zeros_like(spread_out(q, CHANNELS_LAST) + c).to(weights.dtype.element_ty)
        for index in range(0, LEVELS):
            level = tl.cast(index, tl.int32)
            weight = tl.load(scales + k * LEVELS + level)
            if weight != 0.0:
                pooled = pool_row(
                    features, features, sizes, strides, strides, spans, cells, weights, level, k, image, p, q,
                    c, count, channels, bins_y, bins_x, LEVELS, TAPS, False, CHANNELS_LAST
                )  # fmt: skip
                total += weight.to(weights.dtype.element_ty) * pooled
        at = (k * channels + c) * bins_y * bins_x + p * bins_x + spread_out(q, CHANNELS_LAST)
        inside = spread_out(q < bins_x, CHANNELS_LAST) & (c < channels)
        tl.store(output + at, total.to(output.dtype.element_ty), mask=inside)
