// The loss and its gradient on the GPU without pooled values: the Gram form.
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

#include "gram_piece.cuh"

namespace rakd {
namespace gpu {

constexpr int kGramThreads = 128;  // of a block at most; four of them fit a processor's registers

template <class E>
struct GramGradient {
  typedef typename Accumulator<E>::type T;
  GramTables<T> tables;
  Pyramid<const E> map[2];
  Pyramid<E> gradient[2];              // out: the apprentice's and the expert's, the latter with the opposite sign
  int32_t first_tile[kMaxLevels + 1];  // of each level, then the end; image-major
  int32_t channels;
  int32_t stage_cells;  // that the stage has room for
  double* partial;      // [slabs, tiles]: losses
  int32_t* finished;    // blocks; zero at the launch
  double* total;        // out
};

// The block's shared memory, in this order; the stage fills the rest.
template <class T>
struct GramMemory {
  Piece<T>* pieces;       // [warps]
  double* sums;           // [warps], or counts of meetings
  int32_t* bounds;        // [warps, 4]
  GramMeeting* meetings;  // [threads]
  Quad<T>* stage;

  __device__ GramMemory(unsigned char* shared, int32_t warps) {
    pieces = reinterpret_cast<Piece<T>*>(shared);
    bounds = reinterpret_cast<int32_t*>(pieces + warps);
    sums = reinterpret_cast<double*>(bounds + 4 * warps);
    meetings = reinterpret_cast<GramMeeting*>(sums + 2 * ((warps + 1) / 2));
    stage = reinterpret_cast<Quad<T>*>(meetings + 32 * warps);
  }
};

// Bytes of the shared memory but for the stage.
template <class T>
RAKD_HD size_t gram_shared_bytes(int threads) {
  const size_t warps = size_t(threads) / 32;
  return warps * (sizeof(Piece<T>) + 4 * sizeof(int32_t)) + 2 * ((warps + 1) / 2) * sizeof(double) +
         size_t(threads) * sizeof(GramMeeting);
}

// The least rectangle that holds those of all threads; `bounds` must not be written before another barrier.
__device__ __forceinline__ void bound_in_block(const Rectangle& own, int32_t* bounds) {
  int32_t least[4] = {own.top, own.left, -own.bottom, -own.right};
  for (int side = 0; side < 4; ++side) {
    for (int step = 16; step > 0; step /= 2) {
      const int32_t other = __shfl_xor_sync(0xffffffffu, least[side], step);
      least[side] = other < least[side] ? other : least[side];
    }
    if (threadIdx.x % 32 == 0) bounds[threadIdx.x / 32 * 4 + side] = least[side];
  }
}

__device__ __forceinline__ Rectangle read_bounds(const int32_t* bounds) {
  int32_t least[4] = {INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX};
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) {
    for (int side = 0; side < 4; ++side) {
      least[side] = bounds[4 * warp + side] < least[side] ? bounds[4 * warp + side] : least[side];
    }
  }
  return Rectangle{least[0], least[1], -least[2], -least[3]};
}

// What to stage of the cells that are needed: all, or a tile with a rim, or nothing.
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
  const MapView<const E>&a = call.map[0].level[level], &e = call.map[1].level[level];
  const int32_t quads = int32_t(blockDim.x) / kGramColumns, thread = int32_t(threadIdx.x);
  const bool channels_inner = a.stride[1] == 1;
  const int32_t quad = channels_inner ? thread % quads : thread / kGramColumns;
  const int32_t columns = stage.held.columns();
  if (first_channel + quad * kQuad >= call.channels) return;
  const Difference<E> difference(a, e, image, first_channel + quad * kQuad, call.channels);
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
__device__ __forceinline__ void apply_piece(const GramGradient<E>& call, int level, int32_t image, int32_t channel,
                                            const Piece<T>& piece, const Stage<T>& stage, T (&sum)[kGramRows][kQuad]) {
  const int32_t column = int32_t(threadIdx.x) % kGramColumns, quad = int32_t(threadIdx.x) / kGramColumns;
  const int32_t quads = int32_t(blockDim.x) / kGramColumns, length = piece.length[column];
  if (length == 0) return;
  const auto spread_row = [&](int32_t row, const T* middle) {
    RAKD_UNROLL
    for (int r = 0; r < kGramRows; ++r) {
      const T weight = piece.weight_y[row][r];
      if (weight == T(0)) continue;  // what is not coupled must not meet, lest NaN spreads
      RAKD_UNROLL
      for (int c = 0; c < kQuad; ++c) sum[r][c] += weight * middle[c];
    }
  };
  if (piece.staged) {
    // Shorter bands than the widest repeat their first cell with weight zero.
    T weight[kPieceCells];
    const Quad<T>* from[kPieceCells];
    RAKD_UNROLL
    for (int s = 0; s < kPieceCells; ++s) {
      weight[s] = s < length ? piece.weight_x[s][column] : T(0);
      from[s] = stage.data + stage.place(piece.place[s < length ? s : 0][column], quad, quads);
    }
    for (int32_t row = 0; row < piece.rows; ++row) {
      const int32_t skipped = stage.row(piece.row[row], quads);
      T middle[kQuad] = {T(0), T(0), T(0), T(0)};
      RAKD_UNROLL
      for (int s = 0; s < kPieceCells; ++s) {
        if (s >= piece.widest) break;
        const Quad<T> values = from[s][skipped];
        RAKD_UNROLL
        for (int c = 0; c < kQuad; ++c) middle[c] += weight[s] * values.value[c];
      }
      spread_row(row, middle);
    }
    return;
  }
  const Difference<E> difference(call.map[0].level[level], call.map[1].level[level], image, channel, call.channels);
  const int32_t* cell = bands_of(call.tables, level, 1, piece.box).cell + piece.first[column];
  for (int32_t row = 0; row < piece.rows; ++row) {
    T middle[kQuad] = {T(0), T(0), T(0), T(0)};
    RAKD_ROLLED
    for (int32_t s = 0; s < length; ++s) {
      const Quad<T> values = difference(piece.row[row], cell[s]);
      const T weight = piece.weight_x[s][column];
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
  const int64_t blocks = int64_t(gridDim.x) * gridDim.y;
  int32_t* last = reinterpret_cast<int32_t*>(sums);
  if (threadIdx.x == 0) {
    call.partial[blockIdx.y * int64_t(gridDim.x) + blockIdx.x] = 0.5 * loss;
    __threadfence();  // before the counter tells of it
    *last = atomicAdd(call.finished, 1) == blocks - 1;
    __threadfence();  // before the others' parts are read
  }
  __syncthreads();
  if (!*last) return;
  const volatile double* partial = call.partial;
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) total += partial[i];
  __syncthreads();  // sums[] held the verdict
  total = block_sum(total, sums);
  if (threadIdx.x == 0) *call.total = total;
}

// Block (tile of all levels and images, slab: a quad of channels each half a warp); blockDim.x is 32 times a power of
// two.
template <class E>
__global__ void __launch_bounds__(kGramThreads, 4) gram_gradient(GramGradient<E> call) {
  typedef typename Accumulator<E>::type T;
  RAKD_SHARED(shared);
  const GramTables<T>& tables = call.tables;
  const int32_t warps = int32_t(blockDim.x) / 32, warp = int32_t(threadIdx.x) / 32;
  const int32_t quads = int32_t(blockDim.x) / kGramColumns, quad = int32_t(threadIdx.x) / kGramColumns;
  const GramMemory<T> memory(shared, warps);

  const int32_t number = int32_t(blockIdx.x);
  int level = 0;
  while (number >= call.first_tile[level + 1]) ++level;
  const int32_t height = tables.size[level][0], width = tables.size[level][1];
  const int32_t tiles_x = (width + kGramColumns - 1) / kGramColumns, tiles_y = (height + kGramRows - 1) / kGramRows;
  const int32_t within = number - call.first_tile[level];
  const Tile tile{within / (tiles_x * tiles_y), within / tiles_x % tiles_y * kGramRows, within % tiles_x * kGramColumns,
                  kGramRows, kGramColumns};
  const int32_t slab = int32_t(blockIdx.y) * quads * kQuad, channel = slab + quad * kQuad;
  const bool real = channel < call.channels;

  T sum[kGramRows][kQuad];
  RAKD_UNROLL
  for (int r = 0; r < kGramRows; ++r) {
    RAKD_UNROLL
    for (int c = 0; c < kQuad; ++c) sum[r][c] = T(0);
  }
  Stage<T> stage{memory.stage, {0, 0, 0, 0}};
  bool met = false;
  for (int64_t begin = 0; begin < tables.boxes; begin += blockDim.x) {
    GramMeeting own{int32_t(threadIdx.x), {0, 0}, {0, 0}};
    Rectangle needed{INT32_MAX, INT32_MAX, -INT32_MAX, -INT32_MAX};
    const int64_t candidate = begin + threadIdx.x;
    const bool meets = candidate < tables.boxes && meet(tables, level, candidate, tile, &own, &needed);
    int32_t found;
    const int32_t place = rank_in_block(meets, reinterpret_cast<int32_t*>(memory.sums), &found);
    if (meets) memory.meetings[place] = own;
    if (found > 0) bound_in_block(needed, memory.bounds);
    __syncthreads();
    if (found == 0) continue;
    met = true;
    stage.held = choose_stage(read_bounds(memory.bounds), tile, call.stage_cells);
    fill_stage(call, level, tile.image, slab, stage);
    for (int32_t first = 0; first < found; first += warps) {
      int32_t parts = 1;
      for (int32_t part = 0; part < parts; ++part) {
        if (first + warp < found) {
          const GramMeeting at = memory.meetings[first + warp];
          make_piece(tables, level, tile, begin + at.box, at, part, stage.held, memory.pieces + warp);
        }
        __syncthreads();
        for (int32_t n = 0; n < warps && first + n < found; ++n) {
          const Piece<T>& piece = memory.pieces[n];
          parts = max(parts, piece.parts);
          if (real && piece.rows > 0) apply_piece(call, level, tile.image, channel, piece, stage, sum);
        }
        __syncthreads();  // pieces, meetings and stage are written anew
      }
    }
  }

  double loss = 0.0;
  const int32_t x = tile.left + int32_t(threadIdx.x) % kGramColumns;
  if (real && x < width) {
    const Difference<E> difference(call.map[0].level[level], call.map[1].level[level], tile.image, channel,
                                   call.channels);
    const int32_t channels = call.channels - channel < kQuad ? call.channels - channel : kQuad;
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
        const MapView<E>& view = call.gradient[output].level[level];
        if (!view.data) continue;
        E* out = view.data + tile.image * view.stride[0] + channel * view.stride[1] + y * view.stride[2] +
                 x * view.stride[3];
        write_channels<kQuad>(sum[r], output == 0 ? T(1) : T(-1), out, view.stride[1], channels);
      }
    }
  }
  finish_loss(call, loss, memory.sums);
}

}  // namespace gpu
}  // namespace rakd
