// RoIAlign along one axis as a sparse matrix R (bins x touched cells), by bin and by cell: the one builder of both the
// CPU plans and the device's tables.
#pragma once

#include "geometry.h"

namespace rakd {

// Arrays are the caller's. Capacities: see axis_capacity().
template <class T>
struct AxisTable {
  int32_t* count;        // touched cells
  int32_t* cell;         // [cells] their positions, increasing
  int32_t* cell_bin;     // [cells] first bin each feeds
  int32_t* cell_offset;  // [cells + 1] into spread
  int32_t* bin_cell;     // [bins] first touched cell of each bin
  int32_t* bin_offset;   // [bins + 1] into pool
  T* pool;               // [weights] R, bin by bin
  T* spread;             // [weights] R, cell by cell
};

struct AxisCapacity {
  int64_t cells, weights;
};

// A fixed ratio gives two taps a sample. Where samples are closer than a cell, the touched cells are bounded by the
// map, and each further bin repeats at most two of them.
RAKD_HD AxisCapacity axis_capacity(int64_t size, int64_t bins, int64_t sampling_ratio) {
  const int64_t dense = size + 2 * bins;
  const bool sparse = sampling_ratio > 0 && sampling_ratio <= dense / (2 * bins);
  const int64_t weights = sparse ? 2 * sampling_ratio * bins : dense;
  return AxisCapacity{weights < size ? weights : size, weights};
}

// R by bin. Positions never decrease from sample to sample but for the last bit's rounding (boxes of no extent on a
// cell's border), so a sample's cells are new ones or the last two.
template <class T>
RAKD_HD void fill_pool(const AxisSamples& samples, int64_t size, int32_t bins, const AxisTable<T>& table) {
  const double share = static_cast<double>(samples.samples);
  int32_t count = 0, offset = 0, low = -1;
  for (int32_t bin = 0; bin < bins; ++bin) {
    table.bin_offset[bin] = offset;
    table.bin_cell[bin] = count;
    int64_t first, last;
    sample_range(samples, bin, size, &first, &last);
    int32_t filled = 0;
    for (int64_t i = first; i < last; ++i) {
      Tap tap = bilinear_tap(sample_position(samples, bin, i), size);
      if (!tap.valid) continue;
      if (tap.low < low) tap = Tap{true, low, low, 1.0, 0.0};
      low = static_cast<int32_t>(tap.low);
      if (count == 0 || low > table.cell[count - 1]) table.cell[count++] = low;
      const int32_t local = low == table.cell[count - 1] ? count - 1 : count - 2;
      if (tap.high > table.cell[count - 1]) table.cell[count++] = static_cast<int32_t>(tap.high);
      if (filled == 0) table.bin_cell[bin] = local;
      const int32_t at = local - table.bin_cell[bin];
      const int32_t needed = tap.high == tap.low ? at + 1 : at + 2;
      for (; filled < needed; ++filled) table.pool[offset + filled] = T(0);
      table.pool[offset + at] += T(tap.weight_low / share);
      if (tap.high != tap.low) table.pool[offset + at + 1] += T(tap.weight_high / share);
    }
    offset += filled;
  }
  table.bin_offset[bins] = offset;
  *table.count = count;
}

// R transposed. The bins of one cell are neighbours, because bins' cells never go back.
template <class T>
RAKD_HD void fill_spread(int32_t bins, const AxisTable<T>& table) {
  int32_t offset = 0, first = 0;
  const auto end = [&](int32_t bin) { return table.bin_cell[bin] + table.bin_offset[bin + 1] - table.bin_offset[bin]; };
  for (int32_t t = 0; t < *table.count; ++t) {
    while (first < bins && end(first) <= t) ++first;
    table.cell_bin[t] = first;
    table.cell_offset[t] = offset;
    for (int32_t bin = first; bin < bins && table.bin_cell[bin] <= t && end(bin) > t; ++bin) {
      table.spread[offset++] = table.pool[table.bin_offset[bin] + t - table.bin_cell[bin]];
    }
  }
  table.cell_offset[*table.count] = offset;
}

}  // namespace rakd
