// Gram bands on the GPU (gram_table.h): a block makes the sampling tables of one box on one level and leaves, of either
// axis, the touched cells, the band of each and its values. The gradient kernel needs no more of a box.
#pragma once

#include "../gram_table.h"
#include "pool.cuh"

namespace rakd {
namespace gpu {

// Where the arrays of one axis begin in the room of its box and level.
struct BandLayout {
  int32_t ints, values;
  int32_t cells, pitch;  // capacities: touched cells, and cells of a band
};

// What make_gram leaves, and all that gram_gradient knows of boxes and maps' sizes.
template <class T>
struct GramTables {
  int64_t boxes;
  int32_t levels, images;
  int32_t size[kMaxLevels][2];  // [level][axis]: cells
  BandLayout axis[kMaxLevels][2];
  LevelLayout level[kMaxLevels];
  int32_t* ints;
  T* values;
  const int32_t* extents;  // [levels, kExtent, boxes]
  const double* scales;    // [levels, boxes]
};

// The bands of one axis of a box.
template <class T>
struct Bands {
  int32_t* count;  // touched cells
  int32_t* cell;   // [cells] their positions, increasing
  int32_t* begin;  // [cells] the band of each
  int32_t* end;
  T* value;  // [cells, pitch]
  int32_t pitch;

  // Touched cells that share a bin with one of some neighbouring touched cells.
  RAKD_HD CellRange coupled(const CellRange& cells) const { return CellRange{begin[cells.begin], end[cells.end - 1]}; }
};

RAKD_HD int64_t band_int_count(int64_t cells) { return 1 + 3 * cells; }

template <class T>
RAKD_HD Bands<T> bands_of(const GramTables<T>& tables, int level, int axis, int64_t box) {
  const BandLayout& at = tables.axis[level][axis];
  const LevelLayout& room = tables.level[level];
  Bands<T> bands;
  bands.count = tables.ints + tables.boxes * room.ints_before + box * room.ints + at.ints;
  bands.cell = bands.count + 1;
  bands.begin = bands.cell + at.cells;
  bands.end = bands.begin + at.cells;
  bands.value = tables.values + tables.boxes * room.weights_before + box * room.weights + at.values;
  bands.pitch = at.pitch;
  return bands;
}

template <class T>
RAKD_HD size_t gram_tables_shared_bytes(int64_t room_ints, int64_t room_weights) {
  return kMaxLevels * sizeof(double) + size_t(room_weights) * sizeof(T) + size_t(room_ints) * sizeof(int32_t);
}

// Block (level, box). Sets the counter of finished blocks of the next launch to zero as well.
template <class T>
__global__ void make_gram(Tables<T> tables, GramTables<T> gram, int32_t* finished) {
  RAKD_SHARED(shared);
  const int level = int(blockIdx.x);
  const int64_t box = blockIdx.y + int64_t(blockIdx.z) * gridDim.y;
  if (box >= tables.boxes) return;
  double* scales = reinterpret_cast<double*>(shared);
  T* weights = reinterpret_cast<T*>(scales + kMaxLevels);
  const Room<T> room = tables.in_shared
                           ? Room<T>{reinterpret_cast<int32_t*>(weights + tables.level[level].weights), weights}
                           : workspace_room(tables, level, box);
  make_box_tables(tables, level, level + 1, box, [&](int) { return room; }, scales);
  publish_extent(tables, level, box, room, scales[level]);
  if (level == 0 && box == 0 && threadIdx.x == 0) *finished = 0;
  if (scales[level] == 0.0) return;  // the gradient kernel skips this box as well

  const int32_t rows = *axis_table(tables, 0, level, 0, room).count;
  const int32_t columns = *axis_table(tables, 0, level, 1, room).count;
  for (int32_t i = threadIdx.x; i < rows + columns; i += blockDim.x) {
    const int axis = i < rows ? 0 : 1;
    const int32_t t = axis == 0 ? i : i - rows, bins = tables.bins[axis];
    const AxisTable<T> table = axis_table(tables, 0, level, axis, room);
    const Bands<T> bands = bands_of(gram, level, axis, box);
    const CellRange band = gram_band(table, bins, t);
    if (t == 0) *bands.count = *table.count;
    bands.cell[t] = table.cell[t];
    bands.begin[t] = band.begin;
    bands.end[t] = band.end;
    T* value = bands.value + int64_t(t) * bands.pitch;
    for (int32_t u = band.begin; u < band.end; ++u) value[u - band.begin] = T(gram_value(table, bins, t, u));
  }
}

}  // namespace gpu
}  // namespace rakd
