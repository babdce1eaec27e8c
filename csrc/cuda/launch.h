// Host side of the kernels: sizes of the workspace, grids, launches. Free of torch, so that the emulator's bindings and
// the registered ops launch the same things in the same way.
#pragma once

#include "spread.cuh"

namespace rakd {
namespace gpu {

constexpr int kMaxGrid = 65535;  // of the second and third grid dimension

// Threads of a block. Others are right as well (the tests run several); these are for speed.
struct BlockSizes {
  int tables = 64, pool = 128, sum = 256, spread = 256;
};

// Elements the workspace arrays of a call need.
struct WorkspaceSizes {
  int64_t ints = 0, weights = 0, scales = 0, partial = 0, pooled = 0;
};

// Fills the layout of the tables from boxes, levels, sides, bins, sampling_ratio and sizes.
//
// Capacities: a fixed ratio gives two taps a sample. Where samples are closer than a cell, the touched cells are
// bounded by the map, and each further bin repeats at most two of them.
template <class T>
WorkspaceSizes plan_workspace(Tables<T>& tables, int64_t channels) {
  WorkspaceSizes sizes;
  for (int side = 0; side < tables.sides; ++side) {
    for (int level = 0; level < tables.levels; ++level) {
      for (int axis = 0; axis < 2; ++axis) {
        const int64_t size = tables.size[side][level][axis], bins = tables.bins[axis];
        const AxisCapacity capacity = axis_capacity(size, bins, tables.sampling_ratio);
        const int64_t cells = capacity.cells, weights = capacity.weights;
        tables.layout[side][level][axis] =
            AxisLayout{sizes.ints, sizes.weights, static_cast<int32_t>(cells), static_cast<int32_t>(weights)};
        sizes.ints += tables.boxes * axis_int_count(static_cast<int32_t>(cells), static_cast<int32_t>(bins));
        sizes.weights += tables.boxes * 2 * weights;
      }
    }
  }
  const int64_t bins = int64_t(tables.bins[0]) * tables.bins[1], parts = tables.levels * slabs_of(channels);
  sizes.scales = tables.boxes * tables.levels;
  sizes.partial = tables.boxes * parts;
  sizes.pooled = sizes.partial * bins * kSlab;
  return sizes;
}

template <class T>
void launch_tables(const Tables<T>& tables, const BlockSizes& blocks, cudaStream_t stream) {
  const int64_t threads = tables.boxes * tables.levels * tables.sides * 2;
  const dim3 grid(static_cast<unsigned>((threads + blocks.tables - 1) / blocks.tables));
  RAKD_LAUNCH((make_tables<T>), grid, dim3(blocks.tables), 0, stream, tables);
}

inline unsigned box_grid(int64_t boxes) { return static_cast<unsigned>(boxes < kMaxGrid ? boxes : kMaxGrid); }
inline unsigned box_rounds(int64_t boxes) { return static_cast<unsigned>((boxes + kMaxGrid - 1) / kMaxGrid); }

template <class E>
void launch_distill_pool(const DistillPool<E>& call, const BlockSizes& blocks, cudaStream_t stream) {
  typedef typename Accumulator<E>::type T;
  const Tables<T>& tables = call.tables;
  const dim3 grid(static_cast<unsigned>(slabs_of(call.channels)), box_grid(tables.boxes),
                  box_rounds(tables.boxes) * tables.levels);
  const size_t bytes = pool_shared_bytes<T>(int64_t(tables.bins[0]) * tables.bins[1], blocks.pool);
  RAKD_ALLOW_SHARED((distill_pool<E>), bytes);
  RAKD_LAUNCH((distill_pool<E>), grid, dim3(blocks.pool), bytes, stream, call);
}

inline void launch_sum_losses(const SumLosses<double>& call, const BlockSizes& blocks, cudaStream_t stream) {
  RAKD_LAUNCH((sum_losses<double>), dim3(1), dim3(blocks.sum), blocks.sum * sizeof(double), stream, call);
}

template <class E>
void launch_align_pool(const AlignPool<E>& call, const BlockSizes& blocks, cudaStream_t stream) {
  typedef typename Accumulator<E>::type T;
  const Tables<T>& tables = call.tables;
  const dim3 grid(static_cast<unsigned>(slabs_of(call.channels)), box_grid(tables.boxes), box_rounds(tables.boxes));
  const size_t bytes = pool_shared_bytes<T>(int64_t(tables.bins[0]) * tables.bins[1], 0);
  RAKD_ALLOW_SHARED((align_pool<E>), bytes);
  RAKD_LAUNCH((align_pool<E>), grid, dim3(blocks.pool), bytes, stream, call);
}

// Fills call.first_tile and writes the gradients.
template <class E>
void launch_spread(Spread<E> call, const BlockSizes& blocks, cudaStream_t stream) {
  typedef typename Accumulator<E>::type T;
  const Tables<T>& tables = call.tables;
  const int64_t rows = blocks.spread / kTileColumns;
  call.first_tile[0] = 0;
  for (int level = 0; level < tables.levels; ++level) {
    const int64_t height = tables.size[call.side][level][0], width = tables.size[call.side][level][1];
    const int64_t tiles = ((height + rows - 1) / rows) * ((width + kTileColumns - 1) / kTileColumns);
    call.first_tile[level + 1] = call.first_tile[level] + tiles * tables.images;
  }
  const int64_t tiles = call.first_tile[tables.levels];
  if (tiles == 0) return;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(slabs_of(call.channels)));
  const size_t bytes = spread_shared_bytes<T>(tables.bins[1], blocks.spread);
  RAKD_LAUNCH((spread<E>), grid, dim3(blocks.spread), bytes, stream, call);
}

}  // namespace gpu
}  // namespace rakd
