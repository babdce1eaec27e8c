"""Kernels that prepare boxes: level weights, and the sparse rows of RoIAlign's two factors.

The rules are those of ``csrc/geometry.h`` and ``reference.py``, in float64. ``sample_bins`` must be launched
without fused multiply-adds: the reference rounds after each operation, and a last bit decides at a map's
border.

Triton turns Python floats into float32 unless told otherwise: hence ``tl.full(..., tl.float64)`` around
constants that are stored, and arguments annotated ``tl.float64``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rakd_ops.levels import LEVEL_EPSILON

EPSILON = tl.constexpr(LEVEL_EPSILON)
MOST_SAMPLES = tl.constexpr(9.0e15)  # kMaxSamples in csrc/geometry.h: one more could not be told from it


@triton.jit
def pick(values, level, item: tl.constexpr, items: tl.constexpr, LEVELS: tl.constexpr):
    """Entry ``item`` of a level that is known at run time, out of a tuple of ``items`` entries per level."""
    chosen = values[item]
    for other in tl.static_range(1, LEVELS):
        chosen = tl.where(level == other, values[items * other + item], chosen)
    return chosen


@triton.jit
def weigh_levels(
    boxes,
    coefficients,
    scales,
    images,
    count,
    batch,
    factor: tl.float64,
    sigma: tl.float64,
    canonical_size: tl.float64,
    canonical_level: tl.float64,
    LEVEL_OF: tl.constexpr,
    LEVELS: tl.constexpr,
    ASSIGNMENT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``scales[k, l] = w_kl u_k factor`` (0 for a box of no image), ``images[k]`` the box's image or -1.

    With ``m = canonical_level + log2(sqrt(w h) / canonical_size)`` clamped to the levels:
    soft (0): ``w_kl ∝ exp(-(l - m)² / (2 sigma²))``; hard (1): 1 at the coarsest level not above
    ``m + 1e-6``; uniform (2): ``1 / L``.
    """
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < count
    box = boxes + 5 * k.to(tl.int64)
    index = tl.load(box, mask=inside, other=-1.0)
    known = (index >= 0.0) & (index < batch) & (tl.floor(index) == index)
    tl.store(images + k, tl.where(known, index, -1.0).to(tl.int32), mask=inside)
    base = tl.full((BLOCK,), factor, tl.float64)
    if WEIGHTED:
        base *= tl.load(coefficients + k, mask=inside, other=0.0)
    base = tl.where(known, base, 0.0)
    row = scales + k.to(tl.int64) * LEVELS

    if ASSIGNMENT == 2:
        for level in tl.static_range(LEVELS):
            tl.store(row + level, base / LEVELS, mask=inside)
    else:
        width = tl.load(box + 3, mask=inside, other=0.0) - tl.load(box + 1, mask=inside, other=0.0)
        height = tl.load(box + 4, mask=inside, other=0.0) - tl.load(box + 2, mask=inside, other=0.0)
        area = width * height
        sound = area > 0.0  # false for NaN
        lowest = tl.full((BLOCK,), LEVEL_OF[0], tl.float64)
        highest = tl.full((BLOCK,), LEVEL_OF[LEVELS - 1], tl.float64)
        m = canonical_level + tl.log2(tl.sqrt(tl.where(sound, area, 1.0)) / canonical_size)
        m = tl.where(sound & (m > lowest), m, lowest)
        m = tl.where(m > highest, highest, m)
        if ASSIGNMENT == 1:
            chosen = tl.zeros((BLOCK,), tl.int32)
            for level in tl.static_range(1, LEVELS):
                reached = tl.full((BLOCK,), LEVEL_OF[level], tl.float64) <= m + EPSILON
                chosen = tl.where(reached, level, chosen)
            for level in tl.static_range(LEVELS):
                tl.store(row + level, tl.where(chosen == level, base, 0.0), mask=inside)
        else:
            # The nearest level's exponent is taken off all, so that no sigma turns this into 0 / 0.
            nearest = (lowest - m) * (lowest - m)
            for level in tl.static_range(1, LEVELS):
                distance = tl.full((BLOCK,), LEVEL_OF[level], tl.float64) - m
                nearest = tl.minimum(nearest, distance * distance)
            total = tl.zeros((BLOCK,), tl.float64)
            for level in tl.static_range(LEVELS):
                distance = tl.full((BLOCK,), LEVEL_OF[level], tl.float64) - m
                total += tl.exp((distance * distance - nearest) * -0.5 / sigma / sigma)
            for level in tl.static_range(LEVELS):
                distance = tl.full((BLOCK,), LEVEL_OF[level], tl.float64) - m
                weight = tl.exp((distance * distance - nearest) * -0.5 / sigma / sigma) / total
                tl.store(row + level, base * weight, mask=inside)


@triton.jit
def touched_cells(one, other, size):
    """First cell, and one past the last, that samples between two positions can touch; (0, 0) if none."""
    low = tl.minimum(one, other)
    high = tl.maximum(one, other)
    # The comparisons with themselves exclude NaN, which minimum and maximum would drop.
    meets = (one == one) & (other == other) & (low <= size) & (high >= -1.0)
    low = tl.minimum(tl.maximum(tl.where(meets, low, 0.0), 0.0), size - 1.0)
    high = tl.minimum(tl.maximum(tl.where(meets, high, 0.0), 0.0), size - 1.0)
    first = tl.floor(low)
    end = tl.minimum(tl.floor(high) + 2.0, size)
    return tl.where(meets, first, 0.0).to(tl.int32), tl.where(meets, end, 0.0).to(tl.int32)


@triton.jit
def bilinear(position, size):
    """Lower cell of a sample, -2 if it does not count (RoIAlign's border), and the next cell's weight."""
    counts = (position >= -1.0) & (position <= size)
    position = tl.maximum(tl.where(counts, position, 0.0), 0.0)
    cell = tl.minimum(tl.floor(position), size - 1.0)
    return tl.where(counts, cell, -2.0), tl.where(cell >= size - 1.0, 0.0, position - cell)


@triton.jit
def sample_bins(
    boxes,
    spans,
    extents,
    cells,
    weights,
    sizes,
    count,
    bins_y,
    bins_x,
    sampling_ratio,
    SCALES: tl.constexpr,
    LEVELS: tl.constexpr,
    TAPS: tl.constexpr,
    TAP_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of ``R_y`` or ``R_x``: a bin of one box, level and axis; lines 0..bins_y-1 are y's, others x's.

    With ``start = low / stride - 1/2``, sample ``i`` of ``n`` of bin ``p`` lies at
    ``start + p bin + (i + 1/2) bin / n``. Written are

    - ``spans[0..1, level, k, line]``: the bin's cells, first and one past the last;
    - ``weights``: of each of those cells, at ``weight_row(level, k, line) + cell``;
    - ``cells[level, k, line, 0..TAPS-1]``, where the bin spans more than ``TAPS = 2n`` cells: those that have
      a weight, else -1. Its samples then lie more than two cells apart, so no two of them share a cell.
      ``TAPS`` is 0 where no bin needs such a list (adaptive sampling leaves no cell out);
    - ``extents[0..3, level, k]``: the box's cells, y first, y end, x first, x end.
    """
    k = tl.program_id(0).to(tl.int64)
    line = tl.program_id(1)
    level = tl.program_id(2)
    lines = bins_y + bins_x
    along_x = line >= bins_y
    p = tl.where(along_x, line - bins_y, line).to(tl.float64)
    bins = tl.where(along_x, bins_x, bins_y).to(tl.float64)
    height = tl.cast(pick(sizes, level, 0, 2, LEVELS), tl.int64)
    width = tl.cast(pick(sizes, level, 1, 2, LEVELS), tl.int64)
    cells_here = tl.where(along_x, width, height)
    size = cells_here.to(tl.float64)
    scale = tl.full((), SCALES[0], tl.float64)
    for other in tl.static_range(1, LEVELS):
        scale = tl.where(level == other, tl.full((), SCALES[other], tl.float64), scale)

    box = boxes + 5 * k + tl.where(along_x, 1, 2)
    start = tl.load(box) * scale - 0.5
    bin_size = (tl.load(box + 2) * scale - 0.5 - start) / bins
    adaptive = tl.ceil(bin_size)
    adaptive = tl.where(adaptive > 0.0, tl.minimum(adaptive, MOST_SAMPLES), 0.0)
    samples = tl.where(sampling_ratio > 0, tl.cast(sampling_ratio, tl.float64), adaptive)
    shares = tl.maximum(samples, 1.0)
    bin_start = start + p * bin_size
    first, end = touched_cells(
        bin_start + 0.5 * bin_size / shares, bin_start + (samples - 0.5) * bin_size / shares, size
    )
    end = tl.where(samples > 0.0, end, first)
    slot = (level.to(tl.int64) * count + k) * lines + line
    tl.store(spans + slot, first)
    tl.store(spans + tl.cast(LEVELS, tl.int64) * count * lines + slot, end)

    if p == 0.0:
        last_start = start + (bins - 1.0) * bin_size
        box_first, box_end = touched_cells(
            bin_start + 0.5 * bin_size / shares, last_start + (samples - 0.5) * bin_size / shares, size
        )
        side = tl.where(along_x, 2, 0) * LEVELS + level
        tl.store(extents + side.to(tl.int64) * count + k, box_first)
        box_end = tl.where(samples > 0.0, box_end, box_first)
        tl.store(extents + (side + LEVELS).to(tl.int64) * count + k, box_end)

    row = weights + weight_row(sizes, level, k, line, count, bins_y, bins_x, LEVELS)
    spacing = bin_size / shares
    for base in range(first, end, BLOCK):
        offset = base + tl.arange(0, BLOCK)
        cell = offset.to(tl.float64)
        # Only samples that can touch these cells, and a few on each side; all where that cannot be told.
        bounded = (samples >= 64.0) & (spacing > 0.0)
        step = tl.where(bounded, spacing, 1.0)
        earliest = tl.floor((tl.cast(base, tl.float64) - 1.0 - bin_start) / step) - 4.0
        latest = tl.ceil((tl.cast(base, tl.float64) + BLOCK - bin_start) / step) + 4.0
        sample = tl.where(bounded, tl.maximum(earliest, 0.0), 0.0)
        stop = tl.where(bounded, tl.minimum(latest, samples), samples)
        total = tl.zeros((BLOCK,), tl.float64)
        while sample < stop:
            low_cell, high_weight = bilinear(bin_start + (sample + 0.5) * bin_size / shares, size)
            total += tl.where(cell == low_cell, 1.0 - high_weight, 0.0)
            total += tl.where(cell == low_cell + 1.0, high_weight, 0.0)
            sample += 1.0
        tl.store(row + offset, (total / shares).to(weights.dtype.element_ty), mask=offset < end)

    if TAPS > 0:  # noqa: SIM102  (known at compile time, the other is not)
        if end - first > TAPS:
            tap = tl.arange(0, TAP_BLOCK)
            upper = tap % 2 == 1
            sample_of = (tap // 2).to(tl.float64)
            low_cell, high_weight = bilinear(bin_start + (sample_of + 0.5) * bin_size / shares, size)
            weight = tl.where(upper, high_weight, 1.0 - high_weight)
            cell = tl.where((low_cell >= 0.0) & (weight > 0.0), low_cell + tl.where(upper, 1.0, 0.0), -1.0)
            tl.store(cells + slot * TAPS + tap, cell.to(tl.int32), mask=tap < TAPS)


@triton.jit
def weight_row(sizes, level, k, line, count, bins_y, bins_x, LEVELS: tl.constexpr):
    """Where a line's weights begin: by level, then box, y's rows before x's; ``line`` may be a block."""
    before = tl.cast(0, tl.int64)
    for other in tl.static_range(LEVELS):
        cells = bins_y * tl.cast(sizes[2 * other], tl.int64)
        cells += bins_x * tl.cast(sizes[2 * other + 1], tl.int64)
        before += tl.where(level > other, cells, 0)
    height = tl.cast(pick(sizes, level, 0, 2, LEVELS), tl.int64)
    width = tl.cast(pick(sizes, level, 1, 2, LEVELS), tl.int64)
    box = before * count + k * (bins_y * height + bins_x * width)
    return box + tl.where(line < bins_y, line * height, bins_y * height + (line - bins_y) * width)
