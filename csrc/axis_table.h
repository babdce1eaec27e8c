// RoIAlign along one axis as a sparse matrix R (bins x cells of the support, which are the cells that some sample
// reads): the one builder of both the CPU plans and the device's tables.
//
// Three steps: count_cells() of every bin, link_bins() once, fill_bin() of every bin. The first and the last treat each
// bin on its own, so a device gives each to a thread of its own.
#pragma once

#include "geometry.h"

namespace rakd {

// Arrays are the caller's. Capacities: see axis_capacity().
template <class T>
struct AxisTable {
  int32_t* count;       // cells of the support
  int32_t* cell;        // [cells] their positions, increasing
  int32_t* cell_bin;    // [cells] first bin each feeds
  int32_t* bin_cell;    // [bins] first cell of each bin, by its number in the support; never decreasing
  int32_t* bin_offset;  // [bins + 1] into pool
  int32_t* bin_new;     // [bins] first cell that no earlier bin weighs
  T* pool;              // [weights] R, bin by bin; a bin's cells are neighbours in the support

  // Weight of cell t of the support in a bin with bin_cell[bin] <= t; 0 past the bin's last cell.
  RAKD_HD T weight(int32_t bin, int32_t t) const {
    const int32_t at = bin_offset[bin] + t - bin_cell[bin];
    return at < bin_offset[bin + 1] ? pool[at] : T(0);
  }
};

struct AxisCapacity {
  int64_t cells, weights;
};

// A fixed ratio gives two taps a sample. Where samples are closer than a cell, the support is bounded by the map, and
// each further bin repeats at most two of its cells.
RAKD_HD AxisCapacity axis_capacity(int64_t size, int64_t bins, int64_t sampling_ratio) {
  const int64_t dense = size + 2 * bins;
  const bool sparse = sampling_ratio > 0 && sampling_ratio <= dense / (2 * bins);
  const int64_t weights = sparse ? 2 * sampling_ratio * bins : dense;
  return AxisCapacity{weights < size ? weights : size, weights};
}

// Calls f(tap) for the samples of one bin that lie on the map, in order.
//
// Within a bin, and from bin to bin, rounding keeps the order of positions, but a bin's last sample may be rounded past
// the start of the next bin (boxes of hardly any extent on a cell's border). Its weight then goes to the same cell, as
// the upper of two, so that lower cells never decrease from sample to sample.
template <class F>
RAKD_HD void for_each_tap(const AxisSamples& samples, int64_t size, int32_t bin, const F& f) {
  const double next = add(samples.start, mul(static_cast<double>(bin) + 1.0, samples.bin));
  int64_t first, last;
  sample_range(samples, bin, size, &first, &last);
  for (int64_t i = first; i < last; ++i) {
    Tap tap = bilinear_tap(sample_position(samples, bin, i), size);
    if (!tap.valid) continue;
    if (tap.low > 0 && next < static_cast<double>(tap.low)) tap = Tap{true, tap.low - 1, tap.low, 0.0, 1.0};
    f(tap);
  }
}

// Step 1, for each bin: leaves the number of its cells in bin_offset, the first in bin_cell, the last lower one in
// bin_new.
template <class T>
RAKD_HD void count_cells(const AxisSamples& samples, int64_t size, int32_t bin, const AxisTable<T>& table) {
  int32_t count = 0, first = -1, low = -1, high = -1;
  for_each_tap(samples, size, bin, [&](const Tap& tap) {
    low = static_cast<int32_t>(tap.low);
    if (count == 0) first = low;
    count += static_cast<int32_t>(tap.high) - (low > high ? low - 1 : high);  // without branches
    high = static_cast<int32_t>(tap.high);
  });
  table.bin_offset[bin] = count;
  table.bin_cell[bin] = first;
  table.bin_new[bin] = low;
}

// Step 2, once. Lower cells never decrease from bin to bin, so a bin shares at most the last two cells with those
// before it; its other cells are new.
template <class T>
RAKD_HD void link_bins(int64_t size, int32_t bins, const AxisTable<T>& table) {
  int32_t count = 0, offset = 0, begin = 0, high = -1;
  for (int32_t bin = 0; bin < bins; ++bin) {
    const int32_t cells = table.bin_offset[bin], first = table.bin_cell[bin], low = table.bin_new[bin];
    const int32_t repeated = first > high ? 0 : first == high ? 1 : 2;
    // A bin without samples on the map may stand between two that share a cell, so it begins at the last two cells.
    const int32_t at = cells > 0 ? count - repeated : count - 2;
    begin = at > begin ? at : begin;
    table.bin_cell[bin] = begin;
    table.bin_offset[bin] = offset;
    table.bin_new[bin] = count;
    if (cells == 0) continue;
    count += cells - repeated;
    offset += cells;
    high = low < size - 1 ? low + 1 : low;
  }
  table.bin_offset[bins] = offset;
  *table.count = count;
  // The last bins without samples follow all cells.
  for (int32_t bin = bins - 1; bin >= 0 && table.bin_offset[bin] == offset; --bin) table.bin_cell[bin] = count;
}

// Step 3, for each bin.
template <class T>
RAKD_HD void fill_bin(const AxisSamples& samples, int64_t size, int32_t bin, const AxisTable<T>& table) {
  const double share = static_cast<double>(samples.samples);
  const int32_t begin = table.bin_cell[bin], fresh = table.bin_new[bin];
  T* weight = table.pool + table.bin_offset[bin];
  int32_t filled = 0, high = -1;
  const auto place = [&](int64_t cell) {
    high = static_cast<int32_t>(cell);
    weight[filled] = T(0);
    const int32_t t = begin + filled++;
    if (t < fresh) return;  // an earlier bin's
    table.cell[t] = high;
    table.cell_bin[t] = bin;
  };
  for_each_tap(samples, size, bin, [&](const Tap& tap) {
    if (tap.low > high) place(tap.low);
    if (tap.high > high) place(tap.high);
    if (tap.high == tap.low) {
      weight[filled - 1] += T(tap.weight_low / share);
    } else {
      weight[filled - 2] += T(tap.weight_low / share);
      weight[filled - 1] += T(tap.weight_high / share);
    }
  });
}

}  // namespace rakd
