// The loss and its gradient on the GPU without pooled values: the Gram form, gradient = sum over boxes of G_y S G_x.
//
// A block owns a tile of one map's gradient, 8 x 16 cells, and a quad of channels each half a warp. Where boxes meet
// the tile, the difference of the maps on the cells that they need is staged in shared memory. A thread owns a column
// of the tile: for each needed row it sums the band of its column, once, and spreads the sum over its cells of the
// column, which stay in registers to the end. Each element is written once, zeros included; no atomics on them, and
// boxes add up in an order that nothing but their number decides.
//
// The loss is half the product of difference and gradient. The block that finishes last adds the blocks' parts, in the
// order of the blocks.
#pragma once

#include "gram_fragment.cuh"

namespace rakd {
namespace gpu {

constexpr int kGramThreads = 128;  // of a block at most; four of them fit a processor's registers

template <class E>
struct GramGradient {
  typedef decltype(to_accum(E())) T;
  Tables<T> tables;
  Pyramid map[2];                      // apprentice, expert; all of element type E
  Pyramid gradient[2];                 // out: the apprentice's and the expert's, the latter with the opposite sign
  int32_t first_tile[kMaxLevels + 1];  // of each level: channel block, image, tile; then the end
  int32_t stage_cells;                 // that the stage has room for
  double* partial;                     // [blocks]: losses
  int32_t* finished;                   // [1] blocks; zero at the launch
  T* total;                            // out [1]
};

// The block's shared memory, in this order; the stage fills the rest.
template <class T>
struct GramMemory {
  Fragment<T>* fragments;  // [warps]
  double* sums;            // [warps], or counts of boxes
  int32_t* bounds;         // [4] top, left, -bottom, -right of the cells that the tile's boxes need
  TileBox* tile_boxes;     // [threads]
  Quad<T>* stage;

  __device__ GramMemory(unsigned char* shared, int32_t warps) {
    fragments = reinterpret_cast<Fragment<T>*>(shared);
    bounds = reinterpret_cast<int32_t*>(fragments + warps);
    sums = reinterpret_cast<double*>(bounds + 4);
    tile_boxes = reinterpret_cast<TileBox*>(sums + 2 * ((warps + 1) / 2));
    stage = reinterpret_cast<Quad<T>*>(tile_boxes + 32 * warps);
  }
};

// Bytes of the shared memory but for the stage.
template <class T>
RAKD_HD size_t gram_shared_bytes(int threads) {
  const size_t warps = size_t(threads) / 32;
  return warps * sizeof(Fragment<T>) + 4 * sizeof(int32_t) + 2 * ((warps + 1) / 2) * sizeof(double) +
         size_t(threads) * sizeof(TileBox);
}

// The cells to stage of those that are needed: all, or the tile with a rim, or nothing.
__device__ __forceinline__ Rectangle choose_stage(Rectangle needed, const Tile& tile, int32_t cells) {
  const auto fits = [&] {
    return needed.columns() <= kMaxStageColumns && int64_t(needed.rows()) * needed.columns() <= cells;
  };
  if (fits()) return needed;
  needed.top = max(needed.top, tile.top - kHaloRows);
  needed.left = max(needed.left, tile.left - kHaloColumns);
  needed.bottom = min(needed.bottom, tile.top + kGramRows + kHaloRows);
  needed.right = min(needed.right, tile.left + kGramColumns + kHaloColumns);
  return fits() ? needed : Rectangle{0, 0, 0, 0};
}

// By the whole block. Neighbouring threads read neighbouring addresses of either layout.
template <class E, class T>
__device__ void fill_stage(const GramGradient<E>& call, int level, int32_t image, int32_t first_channel,
                           const Stage<T>& stage) {
  const int32_t channels = call.tables.level[level].channels;
  const int32_t quads = int32_t(blockDim.x) / kGramColumns, thread = int32_t(threadIdx.x);
  const bool channels_inner = call.map[0].level[level].channel_stride == 1;
  const int32_t quad = channels_inner ? thread % quads : thread / kGramColumns;
  const int32_t columns = stage.held.columns();
  if (first_channel + quad * kQuad >= channels) return;
  const Difference<E> difference(call.map, level, image, first_channel + quad * kQuad, channels);
  // i / columns = i * reciprocal >> kShift, exactly for any i of the stage, and in 31 bits.
  constexpr int kShift = 20;
  static_assert(kMaxStageCells * kMaxStageColumns <= 1 << kShift && kMaxStageCells << kShift > 0, "exact");
  const int32_t reciprocal = ((1 << kShift) + columns - 1) / max(columns, 1), cells = stage.held.rows() * columns;
  for (int32_t i = channels_inner ? thread / quads : thread % kGramColumns; i < cells; i += kGramColumns) {
    const int32_t row = i * reciprocal >> kShift, column = i - row * columns;
    stage.data[row * columns * quads + stage.place(column, quad, quads)] =
        difference(stage.held.top + row, stage.held.left + column);
  }
}

// sum[r][c] += Σ_rows weight_y[row][r] Σ_cells weight_x[cell] S[row][cell][c], for the thread's column.
template <class E, class T>
__device__ __forceinline__ void apply_fragment(const GramGradient<E>& call, int level, int32_t image, int32_t channel,
                                               const Fragment<T>& fragment, const Stage<T>& stage,
                                               T (&sum)[kGramRows][kQuad]) {
  const int32_t column = int32_t(threadIdx.x) % kGramColumns, quad = int32_t(threadIdx.x) / kGramColumns;
  const int32_t quads = int32_t(blockDim.x) / kGramColumns, length = fragment.length[column];
  if (length == 0) return;
  const auto spread_row = [&](int32_t row, const T* middle) {
    RAKD_UNROLL
    for (int r = 0; r < kGramRows; ++r) {
      const T weight = fragment.weight_y[row][r];
      if (weight == T(0)) continue;  // a row that is not coupled may hold NaN, and 0 * NaN is NaN
      RAKD_UNROLL
      for (int c = 0; c < kQuad; ++c) sum[r][c] += weight * middle[c];
    }
  };
  if (fragment.staged) {
    // A band shorter than the widest repeats its first cell with weight zero, so that all lanes run the same loop.
    T weight[kFragmentCells];
    const Quad<T>* from[kFragmentCells];
    RAKD_UNROLL
    for (int s = 0; s < kFragmentCells; ++s) {
      weight[s] = s < length ? fragment.weight_x[s][column] : T(0);
      from[s] = stage.data + stage.place(fragment.place[s < length ? s : 0][column], quad, quads);
    }
    for (int32_t row = 0; row < fragment.rows; ++row) {
      const int32_t skipped = stage.row(fragment.row[row], quads);
      T middle[kQuad] = {T(0), T(0), T(0), T(0)};
      RAKD_UNROLL
      for (int s = 0; s < kFragmentCells; ++s) {
        if (s >= fragment.widest) break;
        const Quad<T> values = from[s][skipped];
        RAKD_UNROLL
        for (int c = 0; c < kQuad; ++c) middle[c] += weight[s] * values.value[c];
      }
      spread_row(row, middle);
    }
    return;
  }
  const Difference<E> difference(call.map, level, image, channel, call.tables.level[level].channels);
  const int32_t* cell = call.tables.bands(level, 1, fragment.box).cell + fragment.first[column];
  for (int32_t row = 0; row < fragment.rows; ++row) {
    T middle[kQuad] = {T(0), T(0), T(0), T(0)};
    RAKD_ROLLED
    for (int32_t s = 0; s < length; ++s) {
      const Quad<T> values = difference(fragment.row[row], cell[s]);
      const T weight = fragment.weight_x[s][column];
      RAKD_UNROLL
      for (int c = 0; c < kQuad; ++c) middle[c] += weight * values.value[c];
    }
    spread_row(row, middle);
  }
}

// Leaves the block's part of the loss; the last block of all adds them.
template <class E>
__device__ __forceinline__ void finish_loss(const GramGradient<E>& call, double loss, double* sums) {
  loss = block_sum(loss, sums);
  const int64_t blocks = gridDim.x;
  int32_t* last = reinterpret_cast<int32_t*>(sums);
  if (threadIdx.x == 0) {
    call.partial[blockIdx.x] = 0.5 * loss;
    __threadfence();  // the part is visible before the counter
    *last = atomicAdd(call.finished, 1) == blocks - 1;
    __threadfence();  // the other parts are visible from here on
  }
  __syncthreads();
  if (!*last) return;
  const volatile double* partial = call.partial;
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) total += partial[i];
  __syncthreads();  // sums[] held `last`
  total = block_sum(total, sums);
  if (threadIdx.x == 0) *call.total = static_cast<decltype(to_accum(E()))>(total);
}

// Block (level, channel block: a quad of channels each half a warp, image, tile); blockDim.x is 32 times a power of
// two.
template <class E>
__global__ void __launch_bounds__(kGramThreads, 4) gram_gradient(GramGradient<E> call) {
  typedef decltype(to_accum(E())) T;
  RAKD_SHARED(shared);
  const Tables<T>& tables = call.tables;
  const int32_t warps = int32_t(blockDim.x) / 32, warp = int32_t(threadIdx.x) / 32;
  const int32_t quads = int32_t(blockDim.x) / kGramColumns, quad = int32_t(threadIdx.x) / kGramColumns;
  const GramMemory<T> memory(shared, warps);

  const int32_t number = int32_t(blockIdx.x);
  int level = 0;
  while (number >= call.first_tile[level + 1]) ++level;
  const Level& shape = tables.level[level];
  const int32_t height = shape.axis[0][0].size, width = shape.axis[0][1].size;
  const Tile tile(number - call.first_tile[level], tables.images, height, width, kGramRows, kGramColumns);
  const int32_t first_channel = tile.channel_block * quads * kQuad, channel = first_channel + quad * kQuad;
  const bool real = channel < shape.channels;

  T sum[kGramRows][kQuad];
  RAKD_UNROLL
  for (int r = 0; r < kGramRows; ++r) {
    RAKD_UNROLL
    for (int c = 0; c < kQuad; ++c) sum[r][c] = T(0);
  }
  Stage<T> stage{memory.stage, {0, 0, 0, 0}};
  bool met = false;
  const BoxRange range(tables, tile.image);
  for (int64_t begin = range.begin; begin < range.end; begin += blockDim.x) {
    TileBox own{};
    const bool meets = find_tile_box(tables, 0, level, range.box(begin + threadIdx.x, tables.boxes), tile, &own);
    if (threadIdx.x < 4) memory.bounds[threadIdx.x] = INT32_MAX;
    int32_t found;
    const int32_t place = rank_in_block(meets, reinterpret_cast<int32_t*>(memory.sums), &found);
    if (meets) {
      memory.tile_boxes[place] = own;
      const Rectangle needed = cells_needed(tables.bands(level, 0, own.box), tables.bands(level, 1, own.box), own);
      atomicMin(memory.bounds, needed.top);
      atomicMin(memory.bounds + 1, needed.left);
      atomicMin(memory.bounds + 2, -needed.bottom);
      atomicMin(memory.bounds + 3, -needed.right);
    }
    __syncthreads();
    if (found == 0) continue;
    met = true;
    const int32_t* bounds = memory.bounds;
    const Rectangle needed{bounds[0], bounds[1], -bounds[2], -bounds[3]};
    stage.held = choose_stage(needed, tile, call.stage_cells);
    fill_stage(call, level, tile.image, first_channel, stage);
    for (int32_t first = 0; first < found; first += warps) {
      int32_t parts = 1;
      for (int32_t part = 0; part < parts; ++part) {
        if (first + warp < found) {
          make_fragment(tables, level, tile, memory.tile_boxes[first + warp], part, stage.held,
                        memory.fragments + warp);
        }
        __syncthreads();
        for (int32_t n = 0; n < warps && first + n < found; ++n) {
          const Fragment<T>& fragment = memory.fragments[n];
          parts = max(parts, fragment.parts);
          if (real && fragment.rows > 0) apply_fragment(call, level, tile.image, channel, fragment, stage, sum);
        }
        __syncthreads();  // fragments, boxes and stage are written anew
      }
    }
  }

  double loss = 0.0;
  const int32_t x = tile.left + int32_t(threadIdx.x) % kGramColumns;
  if (real && x < width) {
    const Difference<E> difference(call.map, level, tile.image, channel, shape.channels);
    const int32_t channels = min(shape.channels - channel, kQuad);
    RAKD_UNROLL
    for (int r = 0; r < kGramRows; ++r) {
      const int32_t y = tile.top + r;
      if (y >= height) break;
      bool any = false;
      RAKD_UNROLL
      for (int c = 0; c < kQuad; ++c) any = any || sum[r][c] != T(0);
      if (met && any) {
        const Quad<T> values = stage.held.holds(y, x)
                                   ? stage.data[stage.row(y, quads) + stage.place(x - stage.held.left, quad, quads)]
                                   : difference(y, x);
        T products = T(0);  // few enough for T; double is slow on many GPUs
        RAKD_UNROLL
        for (int c = 0; c < kQuad; ++c) {
          if (sum[r][c] != T(0)) products += sum[r][c] * values.value[c];
        }
        loss += double(products);
      }
      for (int output = 0; output < 2; ++output) {
        const MapView& view = call.gradient[output].level[level];
        if (!view.data) continue;
        E* out = view.plane<E>(tile.image, channel) + uint64_t(y) * view.row_stride + uint64_t(x) * view.column_stride;
        write_channels<E, kQuad>(sum[r], output == 0 ? T(1) : T(-1), out, view.channel_stride, channels);
      }
    }
  }
  finish_loss(call, loss, memory.sums);
}

}  // namespace gpu
}  // namespace rakd
