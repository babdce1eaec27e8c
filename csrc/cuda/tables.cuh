// Sampling tables: for each box and level, RoIAlign along each axis as a sparse matrix R (bins x cells), built once a
// call, by rows for pooling and by columns for the gradient.
//
//   box     one axis, in cells of the level's maps:  2 bins from 0.8 on, 2 cells wide, 2 samples in each
//   bins            |----- bin 0 -----|----- bin 1 -----|
//   samples             x        x        x        x            at 1.3, 2.3, 3.3, 4.3: each weighs two cells
//   cells      0      1      2        3        4       5     6  the support is cells 1 .. 5, numbered t = 0 .. 4
//   R, bin 0         .35    .50      .15                        bin_cell[0] = 0: first t;  bin_offset: 0, 3, 6 (into R)
//   R, bin 1                         .35      .50     .15       bin_cell[1] = 2
//   CellBins          0      0      0, 1       1       1        columns of R: the bins that each cell feeds on
//   tiles     ...-----|---------------- tile ----------------|  a block of the gradient kernel owns 8 rows x 32 columns
//
//   pooled[q, p] = sum over t_y, t_x of R_y[q, t_y] R_x[p, t_x] map[cell(t_y), cell(t_x)]
//
// Sizes are bounds that follow from shapes and options, never from values on the device, so that nothing waits for the
// device and a CUDA graph can hold a call. A box of no image, or of weight zero on a level, has no tables there.
#pragma once

#include "../axis_table.h"
#include "elements.cuh"

namespace rakd {
namespace gpu {

// One axis of a box's tables on one side's maps: capacities, and where its arrays begin.
struct AxisLayout {
  int32_t size;    // of the map, in cells
  int32_t cells;   // of the support, at most
  int32_t values;  // weights of R at most
  int32_t offset;  // bytes from the beginning of the box's slice
};

struct Level {
  int64_t first;          // bytes from Tables::slices to the slice of box 0
  int64_t pooled;         // elements of pooled differences on the levels before
  int32_t bytes;          // of one box's slice
  int32_t channels;       // C
  int32_t sides;          // 1: the expert's maps have the apprentice's shape and stride, and share its tables; else 2
  AxisLayout axis[2][2];  // [side][y, x]
};

// A column of R: the bins that one cell of the support feeds, and their weights. A cell feeds more than two bins only
// where bins are narrower than two cells; further weights are then looked up in the rows (AxisTable::weight).
template <class T>
struct alignas(16) CellBins {
  static constexpr int kStored = 2;
  int32_t first, count;
  T weight[kStored];
};

// A slice holds for each side and axis: CellBins [cells], T [values], and the integers of axis_table.h.
template <class T>
RAKD_HD int64_t axis_bytes(int64_t cells, int64_t values, int64_t bins) {
  return (cells * int64_t(sizeof(CellBins<T>)) + values * int64_t(sizeof(T)) + (2 + 2 * cells + 3 * bins) * 4 + 15) /
         16 * 16;
}

// The support of a box: image (-1: the box puts nothing here), first and last row, first and last column.
constexpr int kExtent = 5;

// All that kernels know of a call's boxes, shapes and options.
template <class T>
struct Tables {
  int64_t boxes;  // K
  int32_t levels, images;
  int32_t bins[2];  // y, x
  int32_t sampling_ratio;
  const double* rows;     // [K, 5 + levels], see ../prepare.h
  const int32_t* index;   // [images + 1 + K]: ranges of images, then box numbers in the order of images
  unsigned char* slices;  // out: per level [K] slices
  int32_t* extents;       // out [2, levels, kExtent, K]; by boxes last, as neighbouring threads read neighbouring boxes
  double* scales;         // out [levels, K]: weight * normalizer * factor; 0: the box is not read on that level
  Level level[kMaxLevels];

  RAKD_HD CellBins<T>* columns(int side, int l, int y_or_x, int64_t box) const {
    const int64_t offset = level[l].axis[side][y_or_x].offset;
    return reinterpret_cast<CellBins<T>*>(slices + level[l].first + box * level[l].bytes + offset);
  }

  RAKD_HD AxisTable<T> axis(int side, int l, int y_or_x, int64_t box) const {
    const AxisLayout& at = level[l].axis[side][y_or_x];
    T* pool = reinterpret_cast<T*>(columns(side, l, y_or_x, box) + at.cells);
    int32_t* count = reinterpret_cast<int32_t*>(pool + at.values);
    int32_t *cell_bin = count + 1 + at.cells, *bin_cell = cell_bin + at.cells, *bin_offset = bin_cell + bins[y_or_x];
    return AxisTable<T>{count, count + 1, cell_bin, bin_cell, bin_offset, bin_offset + bins[y_or_x] + 1, pool};
  }

  // Its values lie `boxes` apart.
  RAKD_HD int32_t* extent(int side, int l, int64_t box) const {
    return extents + int64_t(side * levels + l) * kExtent * boxes + box;
  }
};

template <class T>
struct BuildTables {
  Tables<T> tables;
  double stride[2][kMaxLevels];   // [side][level] pixels a cell
  double normalizer[kMaxLevels];  // of weights: 1 / (C * bins) for the loss, 1 for pooling
  Numbers factor;                 // of all weights: [K], or one number (stride 0); data == nullptr: 1
};

// The samples of a box along one axis. Prepared rows are finite and not inverted; rows of a caller of the raw op
// may be anything, and then have no samples.
RAKD_HD AxisSamples box_samples(const double* row, int axis, double stride, int32_t bins, int32_t sampling_ratio) {
  const double low = axis == 0 ? row[2] : row[1], high = axis == 0 ? row[4] : row[3];
  AxisSamples samples = axis_samples(low, high, stride, bins, sampling_ratio);
  if (!(samples.bin >= 0.0 && samples.bin < 1e300 && samples.start > -1e300)) samples.samples = 0;
  return samples;
}

template <class T>
__device__ CellBins<T> find_cell_bins(const AxisTable<T>& table, int32_t bins, int32_t t) {
  const int32_t first = table.cell_bin[t];
  int32_t end = first + 1;
  while (end < bins && table.bin_cell[end] <= t) ++end;
  CellBins<T> found{first, end - first, {}};
  for (int i = 0; i < CellBins<T>::kStored; ++i) {
    found.weight[i] = i < found.count ? table.weight(first + i, t) : T(0);
  }
  return found;
}

// Leaves the support of a box on one level and side; the image -1 where it is empty.
template <class T>
__device__ void store_extent(const Tables<T>& tables, int side, int level, int64_t box, int32_t image) {
  int32_t* extent = tables.extent(side, level, box);
  extent[0] = -1;
  if (image < 0) return;
  for (int axis = 0; axis < 2; ++axis) {
    const AxisTable<T> table = tables.axis(side, level, axis, box);
    if (*table.count == 0) return;
    extent[(1 + 2 * axis) * tables.boxes] = table.cell[0];
    extent[(2 + 2 * axis) * tables.boxes] = table.cell[*table.count - 1];
  }
  extent[0] = image;
}

// Builds the tables of one box on one level, of all sides and both axes; block (level, box). The scale is 0 for a box
// of no image and for a level of weight 0, whatever the factor is, so that a factor that is not finite reaches only
// what counts.
template <class T>
__global__ void build_tables(BuildTables<T> call) {
  const Tables<T>& tables = call.tables;
  const int level = int(blockIdx.x / tables.boxes);
  const int64_t box = blockIdx.x % tables.boxes;
  const Level& shape = tables.level[level];
  const double* row = tables.rows + box * (5 + tables.levels);
  const bool inside = row[0] >= 0.0 && row[0] < static_cast<double>(tables.images) && row[0] == floor(row[0]);
  const double factor = call.factor.data ? call.factor.at(box, 0) : 1.0;
  const double scale = inside && row[5 + level] != 0.0 ? row[5 + level] * call.normalizer[level] * factor : 0.0;
  if (threadIdx.x == 0) tables.scales[level * tables.boxes + box] = scale;
  if (scale == 0.0) {
    for (int side = threadIdx.x; side < shape.sides; side += blockDim.x) store_extent(tables, side, level, box, -1);
    return;
  }
  // Calls f(table, samples, size, bin) for the bins of all sides and axes, one a thread.
  const int32_t bins = tables.bins[0] + tables.bins[1];
  const auto for_each_bin = [&](const auto& f) {
    for (int32_t i = threadIdx.x; i < shape.sides * bins; i += blockDim.x) {
      const int side = i / bins, axis = i % bins < tables.bins[0] ? 0 : 1;
      f(tables.axis(side, level, axis, box),
        box_samples(row, axis, call.stride[side][level], tables.bins[axis], tables.sampling_ratio),
        shape.axis[side][axis].size, axis == 0 ? i % bins : i % bins - tables.bins[0]);
    }
  };
  for_each_bin([](const AxisTable<T>& table, const AxisSamples& samples, int64_t size, int32_t bin) {
    count_cells(samples, size, bin, table);
  });
  __syncthreads();
  for (int32_t i = threadIdx.x; i < shape.sides * 2; i += blockDim.x) {
    link_bins(shape.axis[i / 2][i % 2].size, tables.bins[i % 2], tables.axis(i / 2, level, i % 2, box));
  }
  __syncthreads();
  for_each_bin([](const AxisTable<T>& table, const AxisSamples& samples, int64_t size, int32_t bin) {
    fill_bin(samples, size, bin, table);
  });
  __syncthreads();
  for (int i = 0; i < 2 * shape.sides; ++i) {
    const AxisTable<T> table = tables.axis(i / 2, level, i % 2, box);
    CellBins<T>* columns = tables.columns(i / 2, level, i % 2, box);
    for (int32_t t = threadIdx.x; t < *table.count; t += blockDim.x) {
      columns[t] = find_cell_bins(table, tables.bins[i % 2], t);
    }
  }
  for (int side = threadIdx.x; side < shape.sides; side += blockDim.x) {
    store_extent(tables, side, level, box, static_cast<int32_t>(row[0]));
  }
}

}  // namespace gpu
}  // namespace rakd
