// The Gram matrix G = R^T R of RoIAlign along one axis (axis_table.h), by which the loss's gradient needs no pooled
// values: a band around the diagonal, as cells of the support are coupled only where they share a bin.
//
// Each cell is treated on its own, so a device gives each to a thread of its own.
#pragma once

#include "axis_table.h"

namespace rakd {

// The cells of the support that share a bin with cell t, itself included. Neither end ever decreases with t.
template <class T>
RAKD_HD CellRange gram_band(const AxisTable<T>& table, int32_t bins, int32_t t) {
  const int32_t first = table.cell_bin[t];
  CellRange band{table.bin_cell[first], t + 1};
  for (int32_t bin = first; bin < bins && table.bin_cell[bin] <= t; ++bin) {
    const int32_t end = table.bin_cell[bin] + table.bin_offset[bin + 1] - table.bin_offset[bin];
    if (end > band.end) band.end = end;
  }
  return band;
}

// Σ_bins R[bin][t] R[bin][u]
template <class T>
RAKD_HD double gram_value(const AxisTable<T>& table, int32_t bins, int32_t t, int32_t u) {
  const int32_t lower = t < u ? t : u, upper = t < u ? u : t;
  double sum = 0.0;
  for (int32_t bin = table.cell_bin[upper]; bin < bins && table.bin_cell[bin] <= lower; ++bin) {
    sum += static_cast<double>(table.weight(bin, t)) * static_cast<double>(table.weight(bin, u));
  }
  return sum;
}

// Cells of a band at most, of a support of at most so many. With a fixed ratio a bin has two cells a sample, so a
// cell's bins reach that many less one to either side; adaptive sampling gives no bound.
RAKD_HD int64_t gram_band_capacity(int64_t cells, int64_t sampling_ratio) {
  const bool narrow = sampling_ratio > 0 && sampling_ratio <= cells / 4;
  return narrow ? 4 * sampling_ratio - 1 : cells;
}

}  // namespace rakd
