"""Kernels that pool maps, or the difference of two pyramids' maps, and that transpose pooling for gradients.

For box ``k``, level ``l``, bins ``(p, q)`` and channel ``c`` a map ``F`` is pooled as

    pool(F) = Σ_y R_y[p, y] Σ_x R_x[q, x] F[c, y, x]

over the few cells where ``R`` is not zero (``sampling.py``). All sums are made in a fixed order by one program
each, so results have the same bits in every run.

Arguments that several kernels share: ``tables`` (``launch.Tables``), ``rows`` ``[K, 5 + L]`` float64 (image, x1, y1,
x2, y2, a weight per level), ``channels`` and ``divisors`` ``[L]``, ``starts`` ``[L]`` (where a level begins in
``pooled``), and maps (``launch.Pyramid``: pointers to ``[B, C_l, H_l, W_l]`` and their strides).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rakd_ops._triton.sampling import pick, weight_row


@triton.jit
def image_of(rows, k, inside, batch, LEVELS: tl.constexpr):
    """Image of a box, or of a block of boxes; -1 where the maps have no such image."""
    image = tl.load(rows + k * (5 + LEVELS), mask=inside, other=-1.0)
    known = (image >= 0.0) & (image < batch) & (tl.floor(image) == image)
    return tl.where(known, image, -1.0).to(tl.int32)


@triton.jit
def weight_of(rows, factor, factor_step, k, level, inside, LEVELS: tl.constexpr, FACTOR: tl.constexpr):
    """Weight of a box, or of a block of boxes, on a level, times ``factor[k]`` where FACTOR; zero stays zero."""
    weight = tl.load(rows + k * (5 + LEVELS) + 5 + level, mask=inside, other=0.0)
    if FACTOR:
        product = weight * tl.load(factor + k * factor_step, mask=inside, other=0.0).to(tl.float64)
        weight = tl.where(weight != 0.0, product, 0.0)
    return weight


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
    tables,
    level,
    k,
    image,
    p,
    q,
    c,
    channels,
    LEVELS: tl.constexpr,
    TAPS: tl.constexpr,
    PAIRED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Pool bins ``(p, q)`` of one box from one level: ``pool(map - other)`` where PAIRED, else ``pool(map)``.

    ``q`` is a block of bins, ``c`` a block of the level's ``channels``, shaped to broadcast to the tile that is
    returned. A bin either spans its cells without gaps or, where they are more than TAPS (twice the sampling
    ratio), lists them.
    """
    lines = tables.bins_y + tables.bins_x
    line = tables.bins_y + q
    valid = q < tables.bins_x
    slot = (level.to(tl.int64) * tables.boxes + k) * lines
    ends = tables.spans + tl.cast(LEVELS, tl.int64) * tables.boxes * lines
    y_first = tl.load(tables.spans + slot + p)
    y_count = tl.load(ends + slot + p) - y_first
    x_first = tl.load(tables.spans + slot + line, mask=valid, other=0)
    x_count = tl.load(ends + slot + line, mask=valid, other=0) - x_first
    if TAPS > 0:
        y_listed = y_count > TAPS
        x_listed = x_count > TAPS
        y_count = tl.minimum(y_count, TAPS)
        x_count = tl.minimum(x_count, TAPS)
    columns = tl.max(x_count, axis=0)
    y_row = tables.weights + weight_row(tables, level, k, p, LEVELS)
    x_row = tables.weights + weight_row(tables, level, k, line, LEVELS)
    source = pick(maps.data, level, 0, 1, LEVELS) + image * pick(maps.strides, level, 0, 4, LEVELS)
    source += c.to(tl.int64) * pick(maps.strides, level, 1, 4, LEVELS)
    step_y = pick(maps.strides, level, 2, 4, LEVELS)
    step_x = pick(maps.strides, level, 3, 4, LEVELS)
    if PAIRED:
        other_source = pick(others.data, level, 0, 1, LEVELS) + image * pick(others.strides, level, 0, 4, LEVELS)
        other_source += c.to(tl.int64) * pick(others.strides, level, 1, 4, LEVELS)
        other_step_y = pick(others.strides, level, 2, 4, LEVELS)
        other_step_x = pick(others.strides, level, 3, 4, LEVELS)

    dtype = tables.weights.dtype.element_ty
    total = tl.zeros_like(spread_out(q, CHANNELS_LAST) + c).to(dtype)
    for i in range(0, y_count):
        y = tl.cast(y_first + i, tl.int64)
        if TAPS > 0:
            y = tl.load(tables.cells + (slot + p) * TAPS + i, mask=y_listed, other=y.to(tl.int32)).to(tl.int64)
        y_weight = tl.load(y_row + y, mask=y >= 0, other=0.0)
        if y_weight != 0.0:
            for j in range(0, columns):
                live = j < x_count
                x = x_first + j
                if TAPS > 0:
                    x = tl.load(tables.cells + (slot + line) * TAPS + j, mask=live & x_listed, other=x)
                    live = live & (x >= 0)
                x_weight = tl.load(x_row + x, mask=live, other=0.0)
                column = spread_out(x.to(tl.int64), CHANNELS_LAST)
                reads = spread_out(x_weight != 0.0, CHANNELS_LAST) & (c < channels)
                value = tl.load(source + y * step_y + column * step_x, mask=reads, other=0.0).to(dtype)
                if PAIRED:
                    place = other_source + y * other_step_y + column * other_step_x
                    value -= tl.load(place, mask=reads, other=0.0).to(dtype)
                total += spread_out(y_weight * x_weight, CHANNELS_LAST) * value
    return total


@triton.jit
def distill_rows(
    apprentice,
    expert,
    tables,
    expert_tables,
    rows,
    factor,  # [] or [K], read where FACTOR
    factor_step,
    pooled,  # level by level [K, bins_y, bins_x, C_l], written where KEEP
    losses,  # [K, L, bins_y, channel blocks]
    batch,
    channels,
    divisors,
    starts,
    channel_blocks,
    LEVELS: tl.constexpr,
    TAPS: tl.constexpr,
    EXPERT_TAPS: tl.constexpr,
    SHARED: tl.constexpr,
    KEEP: tl.constexpr,
    FACTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``D = pool(A) - pool(E)`` and its part of the loss, ``w_kl / divisor_l Σ D²``, one number per program.

    A program owns one row ``p`` of bins of a box and level, and a block of channels. SHARED: both pyramids have
    one geometry, so the difference is taken at load. KEEP: ``D`` is written for the gradient; nothing is written
    where the weight is zero, nor read later.
    """
    k = (tl.program_id(0) // channel_blocks).to(tl.int64)
    block = tl.program_id(0) % channel_blocks
    p = tl.program_id(1)
    level = tl.program_id(2)
    many = pick(channels, level, 0, 1, LEVELS)
    c = tl.expand_dims(block * CHANNELS + tl.arange(0, CHANNELS), 0 if CHANNELS_LAST else 1)
    weight = weight_of(rows, factor, factor_step, k, level, k >= 0, LEVELS, FACTOR)
    image = image_of(rows, k, k >= 0, batch, LEVELS).to(tl.int64)
    squares = tl.zeros((), tables.weights.dtype.element_ty)
    counts = (weight != 0.0) & (image >= 0) & (block * CHANNELS < many)
    if counts:
        for base in range(0, tables.bins_x, BINS):
            q = base + tl.arange(0, BINS)
            difference = pool_row(
                apprentice, expert, tables, level, k, image, p, q, c, many, LEVELS, TAPS, SHARED, CHANNELS_LAST
            )
            if not SHARED:
                difference -= pool_row(
                    expert, expert, expert_tables, level, k, image, p, q, c, many, LEVELS, EXPERT_TAPS, False,
                    CHANNELS_LAST,
                )  # fmt: skip
            squares += tl.sum(difference * difference)
            if KEEP:
                at = (k * tables.bins_y + p) * tables.bins_x + spread_out(q.to(tl.int64), CHANNELS_LAST)
                inside = spread_out(q < tables.bins_x, CHANNELS_LAST) & (c < many)
                tl.store(pooled + pick(starts, level, 0, 1, LEVELS) + at * many + c, difference, mask=inside)
    loss = squares.to(tl.float64) * weight / tl.cast(pick(divisors, level, 0, 1, LEVELS), tl.float64)
    at = ((k * LEVELS + level) * tables.bins_y + p) * channel_blocks + block
    tl.store(losses + at, tl.where(counts, loss, 0.0).to(losses.dtype.element_ty))


@triton.jit
def align_rows(
    features,
    tables,
    rows,
    output,  # [K, C, bins_y, bins_x]
    batch,
    channels,
    channel_blocks,
    LEVELS: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``output[k, c, p, q] = Σ_l w_kl pool(F_l)``; a program owns one row ``p`` of bins and a block of channels."""
    k = (tl.program_id(0) // channel_blocks).to(tl.int64)
    block = tl.program_id(0) % channel_blocks
    p = tl.program_id(1)
    c = tl.expand_dims(block * CHANNELS + tl.arange(0, CHANNELS), 0 if CHANNELS_LAST else 1)
    image = image_of(rows, k, k >= 0, batch, LEVELS).to(tl.int64)
    for base in range(0, tables.bins_x, BINS):
        q = base + tl.arange(0, BINS)
        total = tl.zeros_like(spread_out(q, CHANNELS_LAST) + c).to(tables.weights.dtype.element_ty)
        for counter in range(0, LEVELS):
            level = tl.cast(counter, tl.int32)
            weight = weight_of(rows, rows, 0, k, level, k >= 0, LEVELS, False)
            if (weight != 0.0) & (image >= 0):
                pooled = pool_row(
                    features, features, tables, level, k, image, p, q, c, channels, LEVELS, TAPS, False, CHANNELS_LAST
                )
                total += weight.to(tables.weights.dtype.element_ty) * pooled
        at = (k * channels + c) * tables.bins_y * tables.bins_x + p * tables.bins_x + spread_out(q, CHANNELS_LAST)
        inside = spread_out(q < tables.bins_x, CHANNELS_LAST) & (c < channels)
        tl.store(output + at, total.to(output.dtype.element_ty), mask=inside)


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
    tables,
    pooled,  # [bins_y, bins_x, C], of this box and level
    level,
    k,
    y_low,
    x_low,
    c,
    channels,
    weight,
    LEVELS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    CHANNELS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Add one box to a tile: ``total[x, y, c] += weight Σ_q R_x[q, x] (Σ_p R_y[p, y] pooled[p, q, c])``.

    With ``x`` the slowest axis of the tile, the inner sum lies in the threads that add it to the tile.
    """
    lines = tables.bins_y + tables.bins_x
    begins = tables.spans + (level.to(tl.int64) * tables.boxes + k) * lines
    ends = begins + tl.cast(LEVELS, tl.int64) * tables.boxes * lines
    x_begins = begins + tables.bins_y
    x_ends = ends + tables.bins_y
    y = y_low + tl.arange(0, TILE_Y)
    x = x_low + tl.arange(0, TILE_X)
    p_first, p_stop = bins_meeting(begins, ends, tables.bins_y, y_low, y_low + TILE_Y, BINS)
    q_first, q_stop = bins_meeting(x_begins, x_ends, tables.bins_x, x_low, x_low + TILE_X, BINS)
    height = pick(tables.sizes, level, 0, 2, LEVELS)
    width = pick(tables.sizes, level, 1, 2, LEVELS)
    y_rows = tables.weights + weight_row(tables, level, k, 0, LEVELS)
    x_rows = y_rows + tl.cast(tables.bins_y, tl.int64) * height
    dtype = tables.weights.dtype.element_ty
    for q in range(q_first, q_stop):
        at_x = (x >= tl.load(x_begins + q)) & (x < tl.load(x_ends + q))
        x_weight = tl.load(x_rows + tl.cast(q, tl.int64) * width + x, mask=at_x, other=0.0) * weight
        inner = tl.zeros((TILE_Y, CHANNELS), dtype)
        for p in range(p_first, p_stop):
            at_y = (y >= tl.load(begins + p)) & (y < tl.load(ends + p))
            y_weight = tl.load(y_rows + tl.cast(p, tl.int64) * height + y, mask=at_y, other=0.0)
            at = pooled + (tl.cast(p, tl.int64) * tables.bins_x + q) * channels + c
            inner += y_weight[:, None] * tl.load(at, mask=c < channels, other=0.0).to(dtype)[None, :]
        total += x_weight[:, None, None] * inner[None, :, :]
    return total


@triton.jit
def gather_tiles(
    gradients,  # launch.Pyramid, every element is written
    tables,
    rows,
    index,  # [B + 1 + K] int32: where each image's boxes begin in the order that follows
    factor,  # [] or [K], read where FACTOR
    factor_step,
    pooled,  # G, at each level's start [K, bins_y, bins_x, C_l]
    batch,
    channels,
    divisors,
    starts,
    side: tl.float64,
    LEVELS: tl.constexpr,
    FACTOR: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    CHANNELS: tl.constexpr,
    BINS: tl.constexpr,
    BOXES: tl.constexpr,
):
    """The gradient of the maps from that of the pooled values, over the boxes of each image in their order.

        gradient[b, c, y, x] = Σ_k side w_kl / divisor_l Σ_q R_x[q, x] Σ_p R_y[p, y] G[k, l, p, q, c]

    A program owns a tile of cells of one image and level, and a block of channels. Axis 0 of the grid counts the
    tiles of all levels and images, the coarsest first: theirs meet the most boxes each.
    """
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // batch
    image = tl.program_id(0) % batch
    level = tl.cast(0, tl.int32)
    local = tile
    across = tl.cast(1, tl.int32)
    before = tl.cast(0, tl.int32)
    for other in tl.static_range(LEVELS):
        tiles_x = tl.cdiv(tables.sizes[2 * other + 1], TILE_X)
        tiles = tl.cdiv(tables.sizes[2 * other], TILE_Y) * tiles_x
        here = (tile >= before) & (tile < before + tiles)
        level = tl.where(here, other, level)
        local = tl.where(here, tile - before, local)
        across = tl.where(here, tiles_x, across)
        before += tiles
    y_low = local // across * TILE_Y
    x_low = local % across * TILE_X
    many = pick(channels, level, 0, 1, LEVELS)
    if tl.program_id(1) * CHANNELS >= many:
        return
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)

    dtype = tables.weights.dtype.element_ty
    total = tl.zeros((TILE_X, TILE_Y, CHANNELS), dtype)
    source = pooled + pick(starts, level, 0, 1, LEVELS)
    box_step = tl.cast(tables.bins_y, tl.int64) * tables.bins_x * many
    scale = side / tl.cast(pick(divisors, level, 0, 1, LEVELS), tl.float64)
    extent = tables.extents + level.to(tl.int64) * tables.boxes
    axis = tl.cast(LEVELS, tl.int64) * tables.boxes
    # Ranges and order may come from any caller: what lies outside is not followed.
    begin = tl.minimum(tl.maximum(tl.load(index + image), 0), tables.boxes)
    end = tl.minimum(tl.load(index + image + 1), tables.boxes)
    order = index + batch + 1
    for base in range(begin, end, BOXES):
        place = base + tl.arange(0, BOXES)
        k = tl.load(order + place, mask=place < end, other=-1).to(tl.int64)
        inside = (k >= 0) & (k < tables.boxes)
        meets = inside & (image_of(rows, k, inside, batch, LEVELS) == image)
        meets &= weight_of(rows, factor, factor_step, k, level, inside, LEVELS, FACTOR) != 0.0
        meets &= tl.load(extent + k, mask=meets, other=0) < y_low + TILE_Y
        meets &= tl.load(extent + axis + k, mask=meets, other=0) > y_low
        meets &= tl.load(extent + 2 * axis + k, mask=meets, other=0) < x_low + TILE_X
        meets &= tl.load(extent + 3 * axis + k, mask=meets, other=0) > x_low
        for _ in range(0, tl.sum(meets.to(tl.int32), axis=0)):
            next_place = tl.min(tl.where(meets, place, end), axis=0)
            meets &= place != next_place
            box = tl.load(order + next_place).to(tl.int64)
            weight = weight_of(rows, factor, factor_step, box, level, box >= 0, LEVELS, FACTOR) * scale
            total = add_box(
                total, tables, source + box * box_step, level, box, y_low, x_low, c, many, weight.to(dtype),
                LEVELS, TILE_Y, TILE_X, CHANNELS, BINS,
            )  # fmt: skip

    y = y_low + tl.arange(0, TILE_Y)
    x = x_low + tl.arange(0, TILE_X)
    in_map = (y < pick(tables.sizes, level, 0, 2, LEVELS))[None, :, None] & (c < many)[None, None, :]
    in_map &= (x < pick(tables.sizes, level, 1, 2, LEVELS))[:, None, None]
    target = pick(gradients.data, level, 0, 1, LEVELS)
    target += image.to(tl.int64) * pick(gradients.strides, level, 0, 4, LEVELS)
    at_c = c.to(tl.int64) * pick(gradients.strides, level, 1, 4, LEVELS)
    at_y = y.to(tl.int64) * pick(gradients.strides, level, 2, 4, LEVELS)
    at_x = x.to(tl.int64) * pick(gradients.strides, level, 3, 4, LEVELS)
    place = target + at_x[:, None, None] + at_y[None, :, None] + at_c[None, None, :]
    dtype = gradients.data[0].dtype.element_ty
    if dtype != tl.float64:
        total = total.to(tl.float32)  # Triton's interpreter turns float64 into zeros of bfloat16
    tl.store(place, total.to(dtype), mask=in_map)
