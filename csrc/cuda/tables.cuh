// Step 1 on the GPU: sampling tables of all boxes on all levels, one thread per box, level, side and axis.
//
// RoIAlign along one axis is a matrix R (bins x cells). Its columns are kept for touched cells only, twice: by bin, to
// pool (R), and by cell, to spread gradients (R transposed). Sizes are bounds that follow from shapes and options,
// never from values on the device, so nothing here synchronises and a CUDA graph can hold it all.
//
// A box that is not finite touches no cell; one whose batch index is no image's is ignored. Either counts zero.
#pragma once

#include "../axis_table.h"
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
