// Host side of the kernels: sizes of the workspace, grids, launches. Free of torch, so that the emulator's bindings and
// the registered ops launch the same things in the same way.
//
// A training step of the loss is two launches, distill_pool and spread (or those of launch_gram.h); the loss alone two
// (distill_pool, sum_losses); pooling one (align_pool), its gradient two (make_tables, spread).
#pragma once

#include "scale.cuh"
#include "spread.cuh"

namespace rakd {
namespace gpu {

constexpr int kMaxGrid = 65535;               // of the second and third grid dimension
constexpr int64_t kEnoughBlocks = 4096;       // pooling blocks take more channels each when there are more of them
constexpr size_t kSharedBytes = 48 << 10;     // what every architecture gives a block unasked
constexpr int64_t kMaxRoom = INT32_MAX;       // elements of one box's tables
constexpr int64_t kMaxTiles = INT32_MAX - 1;  // of all gradients
constexpr int64_t kScaleBlocks = 1024;        // at most; they end at once where there is nothing to scale

// Threads of a block, multiples of 32; `gram` is 32 times a power of two. On a GPU, `pool`, `spread` and `gram` are at
// most what is set here, and `spread` may nowhere take more shared memory than kSharedBytes; any others are right as
// well (the tests run several), these are for speed.
struct BlockSizes {
  int tables = 64, pool = kPoolThreads, sum = 256, spread = kSpreadThreads, gram = kGramThreads;
};

// What a call keeps of the tables in the workspace, whatever fits shared memory: nothing, extents and scales, or all.
enum class Keep { kNone, kExtents, kForGradients };

// Elements the workspace arrays of a call need.
struct WorkspaceSizes {
  int64_t ints = 0, weights = 0, feeds = 0, extents = 0, scales = 0;
  int64_t room = 0;  // the larger count of the largest room; beyond kMaxRoom nothing may be launched
};

// Fills the layout of the tables from boxes, levels, sides, bins, sampling_ratio and sizes. `all_levels`: a pooling
// block has the tables of all levels at once.
template <class T>
WorkspaceSizes plan_workspace(Tables<T>& tables, Keep keep, bool all_levels, const BlockSizes& blocks) {
  WorkspaceSizes sizes;
  int64_t ints = 0, weights = 0, feeds = 0, most_ints = 0, most_weights = 0;
  for (int level = 0; level < tables.levels; ++level) {
    const int64_t ints_before = ints, weights_before = weights, feeds_before = feeds;
    for (int side = 0; side < tables.sides; ++side) {
      for (int axis = 0; axis < 2; ++axis) {
        const AxisCapacity capacity =
            axis_capacity(tables.size[side][level][axis], tables.bins[axis], tables.sampling_ratio);
        tables.axis[side][level][axis] =
            AxisLayout{static_cast<int32_t>(ints - ints_before), static_cast<int32_t>(weights - weights_before),
                       static_cast<int32_t>(feeds - feeds_before), static_cast<int32_t>(capacity.cells)};
        ints += axis_int_count(capacity.cells, tables.bins[axis]);
        weights += capacity.weights;
        feeds += capacity.cells;
      }
    }
    tables.level[level] =
        LevelLayout{static_cast<int32_t>(ints - ints_before),   static_cast<int32_t>(weights - weights_before),
                    static_cast<int32_t>(ints_before),          static_cast<int32_t>(weights_before),
                    static_cast<int32_t>(feeds - feeds_before), static_cast<int32_t>(feeds_before)};
    most_ints = most_ints > ints - ints_before ? most_ints : ints - ints_before;
    most_weights = most_weights > weights - weights_before ? most_weights : weights - weights_before;
  }
  sizes.room = ints > weights ? ints : weights;
  const size_t bytes = pool_shared_bytes<T>(blocks.pool, tables.bins[1], all_levels ? ints : most_ints,
                                            all_levels ? weights : most_weights);
  tables.in_shared = bytes <= kSharedBytes;
  if (keep == Keep::kForGradients || !tables.in_shared) {
    sizes.ints = tables.boxes * ints;
    sizes.weights = tables.boxes * weights;
  }
  if (keep == Keep::kForGradients) sizes.feeds = tables.boxes * feeds;
  if (keep != Keep::kNone) {
    sizes.extents = tables.sides * tables.levels * kExtent * tables.boxes;
    sizes.scales = tables.levels * tables.boxes;
  }
  return sizes;
}

// How the channels of a box are divided among pooling blocks: `group` slabs each.
struct Division {
  int64_t group, groups;
};

// `boxes`: those (box, level) or boxes that get blocks of their own. Where tables are in the workspace, one block makes
// and reads them.
template <class T>
Division divide(const Tables<T>& tables, int64_t boxes, int64_t channels) {
  const int64_t slabs = slabs_of(channels), wanted = tables.in_shared && boxes > 0 ? kEnoughBlocks / boxes : 1;
  const int64_t most = wanted < 1 ? 1 : wanted > slabs ? slabs : wanted;
  const int64_t group = (slabs + most - 1) / most;
  return Division{group, (slabs + group - 1) / group};
}

inline unsigned box_grid(int64_t boxes) { return static_cast<unsigned>(boxes < kMaxGrid ? boxes : kMaxGrid); }
inline unsigned box_rounds(int64_t boxes) { return static_cast<unsigned>((boxes + kMaxGrid - 1) / kMaxGrid); }

template <class T>
void launch_tables(const Tables<T>& tables, const BlockSizes& blocks, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(tables.levels), box_grid(tables.boxes), box_rounds(tables.boxes));
  RAKD_LAUNCH((make_tables<T>), grid, dim3(blocks.tables), kMaxLevels * sizeof(double), stream, tables);
}

// Losses of a box come in levels * groups parts.
template <class E>
void launch_distill_pool(DistillPool<E> call, const Division& division, const BlockSizes& blocks, cudaStream_t stream) {
  typedef typename Accumulator<E>::type T;
  const Tables<T>& tables = call.tables;
  call.group = static_cast<int32_t>(division.group);
  const dim3 grid(static_cast<unsigned>(division.groups), box_grid(tables.boxes),
                  box_rounds(tables.boxes) * tables.levels);
  int64_t ints = 0, weights = 0;
  for (int level = 0; tables.in_shared && level < tables.levels; ++level) {
    ints = tables.level[level].ints > ints ? tables.level[level].ints : ints;
    weights = tables.level[level].weights > weights ? tables.level[level].weights : weights;
  }
  const size_t bytes = pool_shared_bytes<T>(blocks.pool, tables.bins[1], ints, weights);
  if (tables.sides == 1) {
    RAKD_LAUNCH((distill_pool<E, false>), grid, dim3(blocks.pool), bytes, stream, call);
  } else {
    RAKD_LAUNCH((distill_pool<E, true>), grid, dim3(blocks.pool), bytes, stream, call);
  }
}

inline void launch_sum_losses(const SumLosses<double>& call, const BlockSizes& blocks, cudaStream_t stream) {
  RAKD_LAUNCH((sum_losses<double>), dim3(1), dim3(blocks.sum), blocks.sum / 32 * sizeof(double), stream, call);
}

template <class E>
void launch_align_pool(AlignPool<E> call, const BlockSizes& blocks, cudaStream_t stream) {
  typedef typename Accumulator<E>::type T;
  const Tables<T>& tables = call.tables;
  const Division division = divide(tables, tables.boxes, call.channels);
  call.group = static_cast<int32_t>(division.group);
  const dim3 grid(static_cast<unsigned>(division.groups), box_grid(tables.boxes), box_rounds(tables.boxes));
  const LevelLayout& last = tables.level[tables.levels - 1];
  const size_t bytes = tables.in_shared
                           ? pool_shared_bytes<T>(blocks.pool, tables.bins[1], last.ints_before + last.ints,
                                                  last.weights_before + last.weights)
                           : pool_shared_bytes<T>(blocks.pool, tables.bins[1], 0, 0);
  RAKD_LAUNCH((align_pool<E>), grid, dim3(blocks.pool), bytes, stream, call);
}

// Tiles of so many rows and columns of a gradient.
inline int64_t tile_count(int64_t images, int64_t height, int64_t width, int64_t rows, int64_t columns) {
  return images * ((height + rows - 1) / rows) * ((width + columns - 1) / columns);
}

// Fills call.first_tile, writes the gradients and adds the losses. At most kMaxTiles tiles.
template <class E>
void launch_spread(Spread<E> call, const BlockSizes& blocks, cudaStream_t stream) {
  typedef typename Accumulator<E>::type T;
  const Tables<T>& tables = call.tables;
  call.first_tile[0] = 0;
  for (int map = 0; map < tables.sides * tables.levels; ++map) {
    const int side = map / tables.levels, level = map % tables.levels;
    const bool wanted = tables.sides == 1 || call.gradient[side].level[level].data;
    const int32_t* size = tables.size[side][level];
    const int64_t tiles = wanted ? tile_count(tables.images, size[0], size[1], blocks.spread / 32, kTileColumns) : 0;
    call.first_tile[map + 1] = call.first_tile[map] + static_cast<int32_t>(tiles);
  }
  const unsigned tiles = static_cast<unsigned>(call.first_tile[tables.sides * tables.levels]);
  if (tiles == 0 && !call.sum.total) return;
  const dim3 grid(tiles + (call.sum.total ? 1 : 0), static_cast<unsigned>(slabs_of(call.channels)));
  const size_t bytes = spread_shared_bytes<T>(blocks.spread);
  if (call.pooled || !call.output_gradient) {
    RAKD_LAUNCH((spread<E, true>), grid, dim3(blocks.spread), bytes, stream, call);
  } else {
    RAKD_LAUNCH((spread<E, false>), grid, dim3(blocks.spread), bytes, stream, call);
  }
}

// Scales call.data[0] to call.data[arrays - 1], whose counts are there; fills call.first_piece.
template <class E>
void launch_scale(Scale<E> call, int arrays, cudaStream_t stream) {
  const int64_t of_piece = kScaleThreads * Vector<E>::kCount;
  call.first_piece[0] = 0;
  for (int i = 0; i < kMostScaled; ++i) {
    const int64_t pieces = i < arrays ? (call.count[i] + of_piece - 1) / of_piece : 0;
    call.first_piece[i + 1] = call.first_piece[i] + pieces;
  }
  const int64_t pieces = call.first_piece[kMostScaled];
  if (pieces == 0) return;
  const dim3 grid(static_cast<unsigned>(pieces < kScaleBlocks ? pieces : kScaleBlocks));
  RAKD_LAUNCH((scale<E>), grid, dim3(kScaleThreads), 0, stream, call);
}

}  // namespace gpu
}  // namespace rakd
