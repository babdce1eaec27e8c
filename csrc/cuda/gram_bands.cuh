// Gram bands on the GPU (../gram_table.h), made from the sampling tables: for each box and level, and of either axis,
// the cells of the support, the band of each and its values. gram_gradient reads nothing else of a box.
#pragma once

#include "../gram_table.h"
#include "tables.cuh"

namespace rakd {
namespace gpu {

struct BandAxis {
  int32_t size;          // of the map, in cells
  int32_t cells, pitch;  // capacities: cells of the support, cells of a band
  int32_t offset;        // bytes from the beginning of the slice
};

// The bands of one level.
struct BandLayout {
  int64_t first;  // bytes from GramTables::slices to the slice of box 0
  int32_t bytes;  // of one box's slice
  int32_t channels;
  BandAxis axis[2];  // y, x
};

// All that gram_gradient knows of boxes and of shapes.
template <class T>
struct GramTables {
  int64_t boxes;  // K
  int32_t levels, images;
  const int32_t* index;    // [images + 1 + K], see Tables
  unsigned char* slices;   // out: per level [K] slices
  const int32_t* extents;  // [levels, kExtent, K], see Tables
  const double* scales;    // [levels, K]
  BandLayout level[kMaxLevels];
};

// The bands of one axis of a box.
template <class T>
struct Bands {
  int32_t* count;  // cells of the support
  int32_t* cell;   // [cells] their positions, increasing
  int32_t* begin;  // [cells] the band of each
  int32_t* end;
  T* value;  // [cells, pitch]
  int32_t pitch;

  // The cells that share a bin with one of some neighbouring cells.
  RAKD_HD CellRange coupled(const CellRange& cells) const { return CellRange{begin[cells.begin], end[cells.end - 1]}; }
};

template <class T>
RAKD_HD int64_t band_bytes(int64_t cells, int64_t pitch) {
  return (cells * pitch * int64_t(sizeof(T)) + (1 + 3 * cells) * 4 + 15) / 16 * 16;
}

template <class T>
RAKD_HD Bands<T> bands_of(const GramTables<T>& tables, int level, int axis, int64_t box) {
  const BandLayout& layout = tables.level[level];
  const BandAxis& at = layout.axis[axis];
  Bands<T> bands;
  bands.value = reinterpret_cast<T*>(tables.slices + layout.first + box * layout.bytes + at.offset);
  bands.count = reinterpret_cast<int32_t*>(bands.value + int64_t(at.cells) * at.pitch);
  bands.cell = bands.count + 1;
  bands.begin = bands.cell + at.cells;
  bands.end = bands.begin + at.cells;
  bands.pitch = at.pitch;
  return bands;
}

// Block (level, box). Sets the counter of finished blocks of the next launch to zero as well.
template <class T>
__global__ void build_bands(Tables<T> tables, GramTables<T> gram, int32_t* finished) {
  const int level = int(blockIdx.x / tables.boxes);
  const int64_t box = blockIdx.x % tables.boxes;
  if (blockIdx.x == 0 && threadIdx.x == 0) *finished = 0;
  if (tables.scales[level * tables.boxes + box] == 0.0) return;  // the gradient kernel skips this box as well
  for (int axis = 0; axis < 2; ++axis) {
    const AxisTable<T> table = axis_table(tables, 0, level, axis, box);
    const Bands<T> bands = bands_of(gram, level, axis, box);
    if (threadIdx.x == 0) *bands.count = *table.count;
    for (int32_t t = threadIdx.x; t < *table.count; t += blockDim.x) {
      const CellRange band = gram_band(table, tables.bins[axis], t);
      bands.cell[t] = table.cell[t];
      bands.begin[t] = band.begin;
      bands.end[t] = band.end;
      T* value = bands.value + int64_t(t) * bands.pitch;
      for (int32_t u = band.begin; u < band.end; ++u)
        value[u - band.begin] = T(gram_value(table, tables.bins[axis], t, u));
    }
  }
}

}  // namespace gpu
}  // namespace rakd
