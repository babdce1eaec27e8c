// Step 1 on the GPU: sampling tables of all boxes on all levels, one thread per box, level, side and axis.
//
// RoIAlign along one axis is a matrix R (bins x cells). Its columns are kept for touched cells only, twice: by bin, to
// pool (R), and by cell, to spread gradients (R transposed). Sizes are bounds that follow from shapes and options,
// never from values on the device, so nothing here synchronises and a CUDA graph can hold it all.
//
// A box that is not finite touches no cell; one whose batch index is no image's is ignored. Either counts zero.
#pragma once

#include "../geometry.h"
#include "platform.h"

namespace rakd {
namespace gpu {

constexpr int kMaxLevels = 16;

// Where the tables of one (side, level, axis) lie: box k's integers start at ints + k * int_count, its weights at
// weights + k * 2 * weight_capacity (by bin, then by cell).
struct AxisLayout {
  int64_t ints, weights;
  int32_t cell_capacity, weight_capacity;
};

// Everything about the call that is known before the boxes are.
template <class T>
struct Tables {
  int64_t boxes;
  int32_t levels, sides, images;
  int32_t bins[2];  // y, x
  int32_t sampling_ratio;
  LevelRule rule;
  double factor;  // of all scales: 1 / (channels * bins) for the loss, 1 for pooling
  double level_of[kMaxLevels];
  double stride[2][kMaxLevels];    // [side][level]
  int32_t size[2][kMaxLevels][2];  // [side][level][axis]: cells
  AxisLayout layout[2][kMaxLevels][2];
  const double* rows;          // [boxes, 5]
  const double* coefficients;  // [boxes] or nullptr for ones
  int32_t* ints;
  T* weights;
  double* scales;  // [levels, boxes]: coefficient times level weight times factor
  int32_t* image;  // [boxes]: batch index, or -1
};

// One box along one axis of one map.
template <class T>
struct AxisTable {
  int32_t* count;        // touched cells
  int32_t* cell;         // [cell_capacity] their positions, increasing
  int32_t* cell_bin;     // [cell_capacity] first bin each feeds
  int32_t* cell_offset;  // [cell_capacity + 1] into spread
  int32_t* bin_cell;     // [bins] first touched cell of each bin
  int32_t* bin_offset;   // [bins + 1] into pool
  T* pool;               // [weight_capacity]
  T* spread;             // [weight_capacity]
};

RAKD_HD int32_t axis_int_count(int32_t cell_capacity, int32_t bins) { return 3 * cell_capacity + 2 * bins + 3; }

template <class T>
RAKD_HD AxisTable<T> axis_table(const Tables<T>& tables, int side, int level, int axis, int64_t box) {
  const AxisLayout& at = tables.layout[side][level][axis];
  const int32_t bins = tables.bins[axis];
  AxisTable<T> table;
  table.count = tables.ints + at.ints + box * axis_int_count(at.cell_capacity, bins);
  table.cell = table.count + 1;
  table.cell_bin = table.cell + at.cell_capacity;
  table.cell_offset = table.cell_bin + at.cell_capacity;
  table.bin_cell = table.cell_offset + at.cell_capacity + 1;
  table.bin_offset = table.bin_cell + bins;
  table.pool = tables.weights + at.weights + box * 2 * at.weight_capacity;
  table.spread = table.pool + at.weight_capacity;
  return table;
}

// R by bin. The order of samples makes touched cells come in order too (csrc/cpu/plan.cpp says why).
template <class T>
__device__ void fill_pool(const AxisSamples& samples, int32_t size, int32_t bins, const AxisTable<T>& table) {
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
      table.pool[offset + at] += T(tap.weight_low / static_cast<double>(samples.samples));
      if (tap.high != tap.low) table.pool[offset + at + 1] += T(tap.weight_high / static_cast<double>(samples.samples));
    }
    offset += filled;
  }
  table.bin_offset[bins] = offset;
  *table.count = count;
}

// R transposed. Bins of one cell are neighbours, because bins' cells never go back.
template <class T>
__device__ void fill_spread(int32_t bins, const AxisTable<T>& table) {
  int32_t offset = 0, first = 0;
  for (int32_t t = 0; t < *table.count; ++t) {
    const auto end = [&](int32_t bin) {
      return table.bin_cell[bin] + table.bin_offset[bin + 1] - table.bin_offset[bin];
    };
    while (first < bins && end(first) <= t) ++first;
    table.cell_bin[t] = first;
    table.cell_offset[t] = offset;
    for (int32_t bin = first; bin < bins && table.bin_cell[bin] <= t && end(bin) > t; ++bin) {
      table.spread[offset++] = table.pool[table.bin_offset[bin] + t - table.bin_cell[bin]];
    }
  }
  table.cell_offset[*table.count] = offset;
}

template <class T>
__device__ void fill_scale(const Tables<T>& tables, int level, int64_t box) {
  const double* row = tables.rows + 5 * box;
  const bool inside = row[0] >= 0.0 && row[0] < static_cast<double>(tables.images) && row[0] == floor(row[0]);
  double weights[kMaxLevels];
  level_weights(row[3] - row[1], row[4] - row[2], tables.level_of, tables.levels, tables.rule, weights);
  const double coefficient = tables.coefficients ? tables.coefficients[box] : 1.0;
  tables.scales[level * tables.boxes + box] = inside ? coefficient * weights[level] * tables.factor : 0.0;
  if (level == 0) tables.image[box] = inside ? static_cast<int32_t>(row[0]) : -1;
}

template <class T>
__global__ void make_tables(Tables<T> tables) {
  const int64_t total = tables.boxes * tables.levels * tables.sides * 2;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const int64_t box = i % tables.boxes;
  const int axis = int(i / tables.boxes % 2);
  const int level = int(i / tables.boxes / 2 % tables.levels);
  const int side = int(i / tables.boxes / 2 / tables.levels);
  const double* row = tables.rows + 5 * box;
  const int32_t bins = tables.bins[axis], size = tables.size[side][level][axis];
  const double low = axis == 0 ? row[2] : row[1], high = axis == 0 ? row[4] : row[3];
  AxisSamples samples = axis_samples(low, high, tables.stride[side][level], bins, tables.sampling_ratio);
  // Not finite, or turned around: no samples at all.
  if (!(samples.bin >= 0.0 && samples.bin < 1e300 && samples.start > -1e300)) samples.samples = 0;
  const AxisTable<T> table = axis_table(tables, side, level, axis, box);
  fill_pool(samples, size, bins, table);
  fill_spread(bins, table);
  if (side == 0 && axis == 0) fill_scale(tables, level, box);
}

}  // namespace gpu
}  // namespace rakd
