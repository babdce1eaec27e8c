// Step 3 on the GPU: gradients. A block owns a tile of one map's gradient and one slab of channels: it gathers what all
// boxes put there and writes each element once, zeros included. No atomics, and boxes add up in their order.
#pragma once

#include "pool.cuh"

namespace rakd {
namespace gpu {

constexpr int kTileColumns = 32;  // a warp's threads lie side by side in a row of the tile

template <class E>
struct Spread {
  typedef typename Accumulator<E>::type T;
  Tables<T> tables;
  int32_t side;                        // whose tables
  Pyramid<E> gradient[2];              // out; the second, where wanted, takes the negative
  int64_t first_tile[kMaxLevels + 1];  // tiles of level l: first_tile[l] .. first_tile[l + 1], image-major
  int32_t channels;
  T sign;
  const T* pooled;           // [levels, boxes, slabs, bins, kSlab], scaled; or nullptr
  const E* output_gradient;  // [boxes, channels, bins_y, bins_x], not scaled
};

template <class T>
RAKD_HD size_t spread_shared_bytes(int64_t bins_x, int threads) {
  const size_t rows = size_t(threads) / kTileColumns;
  return 2 * rows * size_t(bins_x) * kSlab * sizeof(T) + size_t(threads + 64) * sizeof(int32_t);
}

// Position of `cell` among the touched ones, or -1.
RAKD_HD int32_t find_cell(const int32_t* cells, int32_t count, int32_t cell) {
  int32_t low = 0, high = count;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (cells[middle] < cell) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && cells[low] == cell ? low : -1;
}

// Keeps the numbers of threads whose flag is set, in order, in list[]; returns how many. Called by the whole block.
__device__ __forceinline__ int32_t compact(bool flag, int32_t* list, int32_t* warp_counts) {
  const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32, warps = int(blockDim.x) / 32;
  int32_t sum = flag ? 1 : 0;
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_sync(0xffffffffu, sum, lane >= step ? lane - step : lane);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_counts[warp] = sum;
  __syncthreads();
  int32_t before = 0, total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) before += warp_counts[w];
    total += warp_counts[w];
  }
  if (flag) list[before + sum - 1] = tid;
  __syncthreads();
  return total;
}

// One value of a box's gradient in pooled form, scaled.
template <class E, class T>
__device__ __forceinline__ T pooled_gradient(const Spread<E>& call, int level, int64_t box, int64_t slab, int32_t bin,
                                             int32_t c) {
  const Tables<T>& tables = call.tables;
  const int32_t bins = tables.bins[0] * tables.bins[1];
  if (call.pooled) {
    return call.pooled[(((level * tables.boxes + box) * slabs_of(call.channels) + slab) * bins + bin) * kSlab + c];
  }
  const int64_t channel = slab * kSlab + c;
  if (channel >= call.channels) return T(0);
  const T scale = T(tables.scales[level * tables.boxes + box]);
  return scale * widen(call.output_gradient[(box * call.channels + channel) * bins + bin]);
}

// Block (tile of all levels and images, slab); blockDim.x is a multiple of 32.
template <class E>
__global__ void spread(Spread<E> call) {
  typedef typename Accumulator<E>::type T;
  RAKD_SHARED(shared);
  const Tables<T>& tables = call.tables;
  const int32_t bins_x = tables.bins[1];
  const int rows = int(blockDim.x) / kTileColumns;
  const int32_t row_values = bins_x * kSlab;
  T* buffers = reinterpret_cast<T*>(shared);  // two, of rows * row_values each
  int32_t* list = reinterpret_cast<int32_t*>(buffers + 2 * rows * row_values);
  int32_t* warp_counts = list + blockDim.x;

  const int64_t tile = blockIdx.x, slab = blockIdx.y;
  if (tile >= call.first_tile[tables.levels]) return;
  int level = 0;
  while (tile >= call.first_tile[level + 1]) ++level;
  const int32_t height = tables.size[call.side][level][0], width = tables.size[call.side][level][1];
  const int64_t tiles_x = (width + kTileColumns - 1) / kTileColumns, tiles_y = (height + rows - 1) / rows;
  const int64_t within = tile - call.first_tile[level];
  const int32_t image = int32_t(within / (tiles_x * tiles_y));
  const int32_t top = int32_t(within / tiles_x % tiles_y) * rows, left = int32_t(within % tiles_x) * kTileColumns;
  const int32_t y = top + int32_t(threadIdx.x) / kTileColumns, x = left + int32_t(threadIdx.x) % kTileColumns;

  T sum[kSlab];
  RAKD_UNROLL
  for (int c = 0; c < kSlab; ++c) sum[c] = T(0);

  int parity = 0;
  for (int64_t begin = 0; begin < tables.boxes; begin += blockDim.x) {
    const int64_t candidate = begin + threadIdx.x;
    bool meets = false;
    if (candidate < tables.boxes && tables.image[candidate] == image &&
        tables.scales[level * tables.boxes + candidate] != 0.0) {
      const AxisTable<T> ay = axis_table(tables, call.side, level, 0, candidate);
      const AxisTable<T> ax = axis_table(tables, call.side, level, 1, candidate);
      meets = *ay.count > 0 && *ax.count > 0 && ay.cell[0] < top + rows && ay.cell[*ay.count - 1] >= top &&
              ax.cell[0] < left + kTileColumns && ax.cell[*ax.count - 1] >= left;
    }
    const int32_t found = compact(meets, list, warp_counts);
    for (int32_t n = 0; n < found; ++n, parity ^= 1) {
      const int64_t box = begin + list[n];
      const AxisTable<T> ay = axis_table(tables, call.side, level, 0, box);
      const AxisTable<T> ax = axis_table(tables, call.side, level, 1, box);
      T* mixed = buffers + parity * rows * row_values;
      // mixed[row][p][c] = Σ_q Ry[q][row] pooled[q][p][c]. Two buffers, so that one barrier a box is enough.
      for (int32_t i = threadIdx.x; i < rows * row_values; i += blockDim.x) {
        const int32_t row = i / row_values, rest = i % row_values;
        const int32_t t = find_cell(ay.cell, *ay.count, top + row);
        T value = T(0);
        if (t >= 0) {
          for (int32_t j = ay.cell_offset[t]; j < ay.cell_offset[t + 1]; ++j) {
            const int32_t bin = (ay.cell_bin[t] + j - ay.cell_offset[t]) * bins_x + rest / kSlab;
            value += ay.spread[j] * pooled_gradient<E, T>(call, level, box, slab, bin, rest % kSlab);
          }
        }
        mixed[i] = value;
      }
      __syncthreads();
      const int32_t t = find_cell(ax.cell, *ax.count, x);
      if (t >= 0) {
        const T* row = mixed + (threadIdx.x / kTileColumns) * row_values;
        for (int32_t j = ax.cell_offset[t]; j < ax.cell_offset[t + 1]; ++j) {
          const T weight = ax.spread[j];
          const T* from = row + (ax.cell_bin[t] + j - ax.cell_offset[t]) * kSlab;
          RAKD_UNROLL
          for (int c = 0; c < kSlab; ++c) sum[c] += weight * from[c];
        }
      }
    }
    __syncthreads();  // list is written anew
  }

  if (y >= height || x >= width) return;
  for (int side = 0; side < 2; ++side) {
    const MapView<E>& view = call.gradient[side].level[level];
    if (!view.data) continue;
    E* out =
        view.data + image * view.stride[0] + slab * kSlab * view.stride[1] + y * view.stride[2] + x * view.stride[3];
    const T sign = side == 0 ? call.sign : -call.sign;
    RAKD_UNROLL
    for (int c = 0; c < kSlab; ++c) {
      if (slab * kSlab + c < call.channels) narrow(sign * sum[c], out + c * view.stride[1]);
    }
  }
}

}  // namespace gpu
}  // namespace rakd
