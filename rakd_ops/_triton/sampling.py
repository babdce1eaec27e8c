"""Kernel that samples the boxes: the sparse rows of RoIAlign's two factors, ``R_y`` and ``R_x``.

The rules are those of ``csrc/geometry.h`` and ``reference.py``, in float64. ``sample_bins`` must be launched
without fused multiply-adds: the reference rounds after each operation, and a last bit decides at a map's
border.

Triton turns Python floats into float32 unless told otherwise: hence ``tl.full(..., tl.float64)`` around
constants, and arguments annotated ``tl.float64``.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_SAMPLES = tl.constexpr(9.0e15)  # kMaxSamples in csrc/geometry.h: one more could not be told from it


@triton.jit
def pick(values, level, item: tl.constexpr, items: tl.constexpr, LEVELS: tl.constexpr):
    """Entry ``item`` of a level that is known at run time, out of a tuple of ``items`` entries per level."""
    chosen = values[item]
    for other in tl.static_range(1, LEVELS):
        chosen = tl.where(level == other, values[items * other + item], chosen)
    return chosen


@triton.jit
def weight_row(tables, level, k, line, LEVELS: tl.constexpr):
    """Offset of a line's weights: by level, then box, y's rows before x's; ``line`` may be a block."""
    before = tl.cast(0, tl.int64)
    for other in tl.static_range(LEVELS):
        cells = tables.bins_y * tl.cast(tables.sizes[2 * other], tl.int64)
        cells += tables.bins_x * tl.cast(tables.sizes[2 * other + 1], tl.int64)
        before += tl.where(level > other, cells, 0)
    height = tl.cast(pick(tables.sizes, level, 0, 2, LEVELS), tl.int64)
    width = tl.cast(pick(tables.sizes, level, 1, 2, LEVELS), tl.int64)
    box = before * tables.boxes + k * (tables.bins_y * height + tables.bins_x * width)
    x_row = tables.bins_y * height + (line - tables.bins_y) * width
    return box + tl.where(line < tables.bins_y, line * height, x_row)


@triton.jit
def support_cells(low, high, size):
    """First cell, and one past the last, that samples from ``low`` to ``high`` can touch; (0, 0) if none."""
    meets = (low <= size) & (high >= -1.0)  # false for NaN
    low = tl.minimum(tl.maximum(tl.where(meets, low, 0.0), 0.0), size - 1.0)
    high = tl.minimum(tl.maximum(tl.where(meets, high, 0.0), 0.0), size - 1.0)
    end = tl.minimum(tl.floor(high) + 2.0, size)
    return tl.where(meets, tl.floor(low), 0.0).to(tl.int32), tl.where(meets, end, 0.0).to(tl.int32)


@triton.jit
def bilinear(position, size):
    """Lower cell of a sample, -2 if it does not count (RoIAlign's border), and the next cell's weight."""
    counts = (position >= -1.0) & (position <= size)
    position = tl.maximum(tl.where(counts, position, 0.0), 0.0)
    cell = tl.minimum(tl.floor(position), size - 1.0)
    return tl.where(counts, cell, -2.0), tl.where(cell >= size - 1.0, 0.0, position - cell)


@triton.jit
def sample_bins(
    rows,  # [K, 5 + L] float64
    tables,  # launch.Tables, which is filled
    sampling_ratio,
    SCALES: tl.constexpr,  # [L] 1 / stride
    LEVELS: tl.constexpr,
    TAPS: tl.constexpr,
    TAP_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of ``R_y`` or ``R_x``: a bin of one box, level and axis; lines 0..bins_y-1 are y's, others x's.

    With ``start = low / stride - 1/2``, sample ``i`` of ``n`` of bin ``p`` lies at
    ``start + p bin + (i + 1/2) bin / n``. An inverted box (x2 < x1 or y2 < y1), or one that
    is not finite, has no samples. Nothing is written, nor read later, where the box's weight on the level is zero.
    """
    k = tl.program_id(0).to(tl.int64)
    line = tl.program_id(1)
    level = tl.program_id(2)
    row = rows + k * (5 + LEVELS)
    if tl.load(row + 5 + level) == 0.0:
        return
    along_x = line >= tables.bins_y
    p = tl.where(along_x, line - tables.bins_y, line).to(tl.float64)
    bins = tl.where(along_x, tables.bins_x, tables.bins_y).to(tl.float64)
    height = tl.cast(pick(tables.sizes, level, 0, 2, LEVELS), tl.int64)
    width = tl.cast(pick(tables.sizes, level, 1, 2, LEVELS), tl.int64)
    size = tl.where(along_x, width, height).to(tl.float64)
    scale = tl.full((), SCALES[0], tl.float64)
    for other in tl.static_range(1, LEVELS):
        scale = tl.where(level == other, tl.full((), SCALES[other], tl.float64), scale)

    corner = row + tl.where(along_x, 1, 2)
    start = tl.load(corner) * scale - 0.5
    bin_size = (tl.load(corner + 2) * scale - 0.5 - start) / bins
    adaptive = tl.minimum(tl.ceil(bin_size), MAX_SAMPLES)
    samples = tl.where(sampling_ratio > 0, tl.cast(sampling_ratio, tl.float64), adaptive)
    samples = tl.where(bin_size >= 0.0, samples, 0.0)  # false for NaN; an infinite bin's positions touch no cell
    shares = tl.maximum(samples, 1.0)
    bin_start = start + p * bin_size
    from_first = 0.5 * bin_size / shares
    to_last = (samples - 0.5) * bin_size / shares
    first, end = support_cells(bin_start + from_first, bin_start + to_last, size)
    end = tl.where(samples > 0.0, end, first)
    lines = tables.bins_y + tables.bins_x
    slot = (level.to(tl.int64) * tables.boxes + k) * lines + line
    tl.store(tables.spans + slot, first)
    tl.store(tables.spans + tl.cast(LEVELS, tl.int64) * tables.boxes * lines + slot, end)

    if p == 0.0:
        last_start = start + (bins - 1.0) * bin_size
        box_first, box_end = support_cells(bin_start + from_first, last_start + to_last, size)
        side = tl.where(along_x, 2, 0) * LEVELS + level
        tl.store(tables.extents + side.to(tl.int64) * tables.boxes + k, box_first)
        box_end = tl.where(samples > 0.0, box_end, box_first)
        tl.store(tables.extents + (side + LEVELS).to(tl.int64) * tables.boxes + k, box_end)

    weights = tables.weights + weight_row(tables, level, k, line, LEVELS)
    spacing = bin_size / shares
    for base in range(first, end, BLOCK):
        offset = base + tl.arange(0, BLOCK)
        cell = offset.to(tl.float64)
        # Only samples that can touch these cells, a few on each side, and those that rounding may bring there; all
        # where that cannot be told.
        bounded = (samples >= 64.0) & (spacing > 0.0)
        step = tl.where(bounded, spacing, 1.0)
        spare = tl.minimum(4.0 + 1e-15 * (tl.abs(bin_start) + size) / step, samples)
        earliest = tl.floor((tl.cast(base, tl.float64) - 1.0 - bin_start) / step) - spare
        latest = tl.ceil((tl.cast(base, tl.float64) + BLOCK - bin_start) / step) + spare
        sample = tl.where(bounded, tl.maximum(earliest, 0.0), 0.0)
        stop = tl.where(bounded, tl.minimum(latest, samples), samples)
        total = tl.zeros((BLOCK,), tl.float64)
        while sample < stop:
            low_cell, high_weight = bilinear(bin_start + (sample + 0.5) * bin_size / shares, size)
            total += tl.where(cell == low_cell, 1.0 - high_weight, 0.0)
            total += tl.where(cell == low_cell + 1.0, high_weight, 0.0)
            sample += 1.0
        tl.store(weights + offset, (total / shares).to(weights.dtype.element_ty), mask=offset < end)

    if TAPS > 0:  # noqa: SIM102  (known at compile time, the other is not)
        if end - first > TAPS:
            tap = tl.arange(0, TAP_BLOCK)
            upper = tap % 2 == 1
            sample_of = (tap // 2).to(tl.float64)
            low_cell, high_weight = bilinear(bin_start + (sample_of + 0.5) * bin_size / shares, size)
            weight = tl.where(upper, high_weight, 1.0 - high_weight)
            cell = tl.where((low_cell >= 0.0) & (weight > 0.0), low_cell + tl.where(upper, 1.0, 0.0), -1.0)
            tl.store(tables.cells + slot * TAPS + tap, cell.to(tl.int32), mask=tap < TAPS)
