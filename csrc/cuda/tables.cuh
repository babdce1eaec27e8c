// Sampling tables on the GPU: a block makes those of one box, a thread a bin, in shared memory or in the workspace.
//
// RoIAlign along one axis is a matrix R (bins x cells), of which the touched cells are kept (axis_table.h). Sizes are
// bounds that follow from shapes and options, never from values on the device, so nothing here synchronises and a CUDA
// graph can hold it all.
//
// A box that is not finite touches no cell; one whose batch index is no image's is ignored. Either counts zero.
#pragma once

#include "../axis_table.h"
#include "platform.h"

namespace rakd {
namespace gpu {

// Where the arrays of one axis begin in the room of its box and level.
struct AxisLayout {
  int32_t ints, weights, feeds;
  int32_t cells;  // capacity
};

// Elements of the room of a box on one level, and of those on the levels before it.
struct LevelLayout {
  int32_t ints, weights, ints_before, weights_before;
  int32_t feeds = 0, feeds_before = 0;  // only of tables that have them
};

// R by columns: the bins that feed one touched cell, so many from the first on, and the weights of the first two,
// beyond which there are none where bins are two cells wide or more. Read at once, as the tables would be one after
// another.
template <class T>
struct alignas(16) Feed {
  static constexpr int kKept = 2;
  int32_t first, count;
  T kept[kKept];
};

// Everything about the call that is known before the boxes are.
template <class T>
struct Tables {
  int64_t boxes;
  int32_t levels, sides, images;
  int32_t bins[2];  // y, x
  int32_t sampling_ratio;
  bool in_shared;  // the pooling kernels make tables in shared memory, else in the workspace
  LevelRule rule;
  double factor;  // of all scales: 1 / (channels * bins) for the loss, 1 for pooling
  double level_of[kMaxLevels];
  double stride[2][kMaxLevels];    // [side][level]
  int32_t size[2][kMaxLevels][2];  // [side][level][axis]: cells
  AxisLayout axis[2][kMaxLevels][2];
  LevelLayout level[kMaxLevels];
  const double* rows;          // [boxes, 5]
  const double* coefficients;  // [boxes] or nullptr for ones
  int32_t* ints;               // the workspace; nullptr where nothing reads it
  T* weights;
  Feed<T>* feeds;    // of the touched cells of either axis, for the gradients
  int32_t* extents;  // [sides, levels, kExtent, boxes], for the gradients; nullptr: not wanted
  double* scales;    // [levels, boxes]: coefficient times level weight times factor; nullptr: not wanted
};

// What a tile asks of a box first: image (-1: counts nothing here), first and last touched row, first and last column.
constexpr int kExtent = 5;

// Memory of the tables of one box on one level: all sides, both axes.
template <class T>
struct Room {
  int32_t* ints;
  T* weights;
};

template <class T>
RAKD_HD Room<T> workspace_room(const Tables<T>& tables, int level, int64_t box) {
  const LevelLayout& at = tables.level[level];
  return Room<T>{tables.ints + tables.boxes * at.ints_before + box * at.ints,
                 tables.weights + tables.boxes * at.weights_before + box * at.weights};
}

// The feeds of the touched cells of one axis, in the workspace.
template <class T>
RAKD_HD Feed<T>* axis_feeds(const Tables<T>& tables, int side, int level, int axis, int64_t box) {
  const LevelLayout& at = tables.level[level];
  return tables.feeds + tables.boxes * at.feeds_before + box * at.feeds + tables.axis[side][level][axis].feeds;
}

RAKD_HD int64_t axis_int_count(int64_t cells, int64_t bins) { return 2 * cells + 3 * bins + 2; }

template <class T>
RAKD_HD AxisTable<T> axis_table(const Tables<T>& tables, int side, int level, int axis, const Room<T>& room) {
  const AxisLayout& at = tables.axis[side][level][axis];
  // Sums of 32 bits, added to a pointer once each, cost a device least.
  const int32_t bins = tables.bins[axis], cell = at.ints + 1, cell_bin = cell + at.cells,
                bin_cell = cell_bin + at.cells, bin_offset = bin_cell + bins, bin_new = bin_offset + bins + 1;
  AxisTable<T> table;
  table.count = room.ints + at.ints;
  table.cell = room.ints + cell;
  table.cell_bin = room.ints + cell_bin;
  table.bin_cell = room.ints + bin_cell;
  table.bin_offset = room.ints + bin_offset;
  table.bin_new = room.ints + bin_new;
  table.pool = room.weights + at.weights;
  return table;
}

// By one thread: coefficient times level weight times factor of each level; zeros for a box of no image.
template <class T>
__device__ void box_scales(const Tables<T>& tables, int64_t box, double* scales) {
  const double* row = tables.rows + 5 * box;
  const bool inside = row[0] >= 0.0 && row[0] < static_cast<double>(tables.images) && row[0] == floor(row[0]);
  level_weights(row[3] - row[1], row[4] - row[2], tables.level_of, tables.levels, tables.rule, scales);
  const double coefficient = tables.coefficients ? tables.coefficients[box] : 1.0;
  for (int level = 0; level < tables.levels; ++level) {
    scales[level] = inside ? coefficient * scales[level] * tables.factor : 0.0;
  }
}

template <class T>
__device__ AxisSamples box_samples(const Tables<T>& tables, int side, int level, int axis, int64_t box) {
  const double* row = tables.rows + 5 * box;
  const double low = axis == 0 ? row[2] : row[1], high = axis == 0 ? row[4] : row[3];
  AxisSamples samples = axis_samples(low, high, tables.stride[side][level], tables.bins[axis], tables.sampling_ratio);
  // Not finite, or turned around: no samples at all.
  if (!(samples.bin >= 0.0 && samples.bin < 1e300 && samples.start > -1e300)) samples.samples = 0;
  return samples;
}

// By the whole block: the scales of `box` on all levels, and its tables on levels first .. last - 1, in room_of(level),
// where the scale is not zero. Ends with a barrier.
template <class T, class RoomOf>
__device__ void make_box_tables(const Tables<T>& tables, int first, int last, int64_t box, const RoomOf& room_of,
                                double* scales) {
  const int32_t bins = tables.bins[0] + tables.bins[1], bins_of_level = tables.sides * bins;
  // Calls f(table, samples, level, side, axis, bin) for all bins, one a thread.
  const auto for_each_bin = [&](const auto& f) {
    for (int32_t i = threadIdx.x; i < (last - first) * bins_of_level; i += blockDim.x) {
      const int level = first + i / bins_of_level, side = i % bins_of_level / bins;
      const int32_t within = i % bins, axis = within < tables.bins[0] ? 0 : 1;
      const AxisTable<T> table = axis_table(tables, side, level, axis, room_of(level));
      f(level, box_samples(tables, side, level, axis, box), int64_t(tables.size[side][level][axis]),
        axis == 0 ? within : within - tables.bins[0], table);
    }
  };
  // The block's last thread has the fewest bins.
  if (threadIdx.x == blockDim.x - 1) box_scales(tables, box, scales);
  for_each_bin([](int, const AxisSamples& samples, int64_t size, int32_t bin, const AxisTable<T>& table) {
    count_cells(samples, size, bin, table);
  });
  __syncthreads();
  for (int32_t i = threadIdx.x; i < (last - first) * tables.sides * 2; i += blockDim.x) {
    const int level = first + i / (tables.sides * 2), side = i / 2 % tables.sides, axis = i % 2;
    const AxisTable<T> table = axis_table(tables, side, level, axis, room_of(level));
    if (scales[level] != 0.0) link_bins(tables.size[side][level][axis], tables.bins[axis], table);
  }
  __syncthreads();
  for_each_bin([&](int level, const AxisSamples& samples, int64_t size, int32_t bin, const AxisTable<T>& table) {
    if (scales[level] != 0.0) fill_bin(samples, size, bin, table);
  });
  __syncthreads();
}

// By the whole block: leaves what a tile asks first of a box on a level, whose tables are in `room`, and its scale.
template <class T>
__device__ void publish_extent(const Tables<T>& tables, int level, int64_t box, const Room<T>& room, double scale) {
  if (threadIdx.x == 0 && tables.scales) tables.scales[level * tables.boxes + box] = scale;
  for (int side = threadIdx.x; side < tables.sides; side += blockDim.x) {
    int32_t* extent = tables.extents + int64_t(side * tables.levels + level) * kExtent * tables.boxes + box;
    extent[0] = -1;
    if (scale == 0.0) continue;
    for (int axis = 0; axis < 2; ++axis) {
      const AxisTable<T> table = axis_table(tables, side, level, axis, room);
      if (*table.count == 0) break;
      extent[(1 + 2 * axis) * tables.boxes] = table.cell[0];
      extent[(2 + 2 * axis) * tables.boxes] = table.cell[*table.count - 1];
      if (axis == 1) extent[0] = static_cast<int32_t>(tables.rows[5 * box]);
    }
  }
}

template <class T>
__device__ Feed<T> feed_of(const AxisTable<T>& table, int32_t bins, int32_t t) {
  const int32_t first = table.cell_bin[t];
  int32_t end = first + 1;
  while (end < bins && table.bin_cell[end] <= t) ++end;
  Feed<T> feed{first, end - first, {}};
  for (int i = 0; i < Feed<T>::kKept; ++i) feed.kept[i] = i < feed.count ? table.weight(first + i, t) : T(0);
  return feed;
}

// The same, the tables themselves, and the feeds.
template <class T>
__device__ void publish(const Tables<T>& tables, int level, int64_t box, const Room<T>& room, double scale) {
  publish_extent(tables, level, box, room, scale);
  if (scale == 0.0) return;
  for (int i = 0; i < 2 * tables.sides; ++i) {
    const int side = i / 2, axis = i % 2;
    const AxisTable<T> table = axis_table(tables, side, level, axis, room);
    Feed<T>* feeds = axis_feeds(tables, side, level, axis, box);
    for (int32_t t = threadIdx.x; t < *table.count; t += blockDim.x) feeds[t] = feed_of(table, tables.bins[axis], t);
  }
  const Room<T> kept = workspace_room(tables, level, box);
  if (kept.ints == room.ints) return;
  for (int32_t i = threadIdx.x; i < tables.level[level].ints; i += blockDim.x) kept.ints[i] = room.ints[i];
  for (int32_t i = threadIdx.x; i < tables.level[level].weights; i += blockDim.x) {
    kept.weights[i] = room.weights[i];
  }
}

// Tables in the workspace, for gradients of pooling. Block (level, box).
template <class T>
__global__ void make_tables(Tables<T> tables) {
  RAKD_SHARED(shared);
  double* scales = reinterpret_cast<double*>(shared);
  const int level = int(blockIdx.x);
  const int64_t box = blockIdx.y + int64_t(blockIdx.z) * gridDim.y;
  if (box >= tables.boxes) return;
  const Room<T> room = workspace_room(tables, level, box);
  make_box_tables(tables, level, level + 1, box, [&](int) { return room; }, scales);
  publish(tables, level, box, room, scales[level]);
}

}  // namespace gpu
}  // namespace rakd
