// Step 2 on the GPU: pooling. A block owns one box, one slab of channels and (for the loss) one level.
//
// A thread owns whole columns (bin p of x, channel c) of the pooled patch: it walks the touched rows in order, pools
// each row into one number and adds it to the bins of y that the row feeds. No thread needs another's numbers, so the
// pooling itself has no barrier, and each sum has a fixed order. The difference of the maps is taken at load.
#pragma once

#include "elements.cuh"

namespace rakd {
namespace gpu {

constexpr int kSlab = 16;  // channels of a block; the innermost dimension of pooled differences in memory

// Adds sign * RoIAlign of one box to pooled[bins_y * bins_x][kSlab] for the block's channels; `b`, where there is one,
// is taken off `a` at load and has the same shape.
template <class E, class T>
__device__ void pool_box(const Tables<T>& tables, int side, int level, int64_t box, int image, MapView<const E> a,
                         MapView<const E> b, int channel, int channels, T sign, T* pooled) {
  const AxisTable<T> y = axis_table(tables, side, level, 0, box), x = axis_table(tables, side, level, 1, box);
  const int32_t bins_x = tables.bins[1], rows = *y.count;
  if (*x.count == 0) return;
  const E* from_a = a.data + image * a.stride[0];
  const E* from_b = b.data ? b.data + image * b.stride[0] : nullptr;
  const bool channels_inner = a.stride[1] == 1;
  for (int32_t item = threadIdx.x; item < bins_x * channels; item += blockDim.x) {
    // Neighbouring threads read neighbouring addresses: channels in one layout, cells in the other.
    const int32_t p = channels_inner ? item / channels : item % bins_x;
    const int32_t c = channels_inner ? item % channels : item / bins_x;
    const E* plane_a = from_a + (channel + c) * a.stride[1];
    const E* plane_b = from_b ? from_b + (channel + c) * b.stride[1] : nullptr;
    const int32_t* cell = x.cell + x.bin_cell[p];
    const T* weight = x.pool + x.bin_offset[p];
    const int32_t taps = x.bin_offset[p + 1] - x.bin_offset[p];
    for (int32_t i = 0; i < rows; ++i) {
      const E* row_a = plane_a + y.cell[i] * a.stride[2];
      const E* row_b = plane_b ? plane_b + y.cell[i] * b.stride[2] : nullptr;
      T sum = T(0);
      for (int32_t t = 0; t < taps; ++t) {
        T value = widen(row_a[cell[t] * a.stride[3]]);
        if (row_b) value -= widen(row_b[cell[t] * b.stride[3]]);
        sum += weight[t] * value;
      }
      sum *= sign;
      for (int32_t j = y.cell_offset[i]; j < y.cell_offset[i + 1]; ++j) {
        const int32_t q = y.cell_bin[i] + j - y.cell_offset[i];
        pooled[(q * bins_x + p) * kSlab + c] += y.spread[j] * sum;
      }
    }
  }
}

// Sum over the block in a fixed order; the result is thread 0's.
__device__ __forceinline__ double block_sum(double value, double* shared) {
  const int tid = int(threadIdx.x), count = int(blockDim.x);
  shared[tid] = value;
  __syncthreads();
  int half = 1;
  while (2 * half < count) half *= 2;
  for (; half > 0; half /= 2) {
    if (tid < half && tid + half < count) shared[tid] += shared[tid + half];
    __syncthreads();
  }
  return shared[0];
}

RAKD_HD int64_t slabs_of(int64_t channels) { return (channels + kSlab - 1) / kSlab; }

// Bytes of shared memory of the pooling kernels.
template <class T>
RAKD_HD size_t pool_shared_bytes(int64_t bins, int threads) {
  return size_t(bins) * kSlab * sizeof(T) + size_t(threads) * sizeof(double);
}

template <class E>
struct DistillPool {
  typedef typename Accumulator<E>::type T;
  Tables<T> tables;
  Pyramid<const E> map[2];
  int32_t channels;
  double* partial;  // out [boxes, levels, slabs]: losses
  T* pooled;        // out [levels, boxes, slabs, bins, kSlab]: 2 * scale * difference; nullptr: not wanted
};

// Block (slab, box, level).
template <class E>
__global__ void distill_pool(DistillPool<E> call) {
  typedef typename Accumulator<E>::type T;
  RAKD_SHARED(shared);
  const Tables<T>& tables = call.tables;
  const int32_t bins = tables.bins[0] * tables.bins[1];
  double* sums = reinterpret_cast<double*>(shared);
  T* pooled = reinterpret_cast<T*>(sums + blockDim.x);
  const int64_t slab = blockIdx.x, box = blockIdx.y + int64_t(blockIdx.z / tables.levels) * gridDim.y;
  const int level = int(blockIdx.z % tables.levels);
  if (box >= tables.boxes) return;
  const int64_t slabs = slabs_of(call.channels);
  const int64_t entry = (level * tables.boxes + box) * slabs + slab;
  const double scale = tables.scales[level * tables.boxes + box];
  double* partial = call.partial + (box * tables.levels + level) * slabs + slab;
  if (scale == 0.0) {  // the spreading step skips this box as well
    if (threadIdx.x == 0) *partial = 0.0;
    return;
  }
  for (int32_t i = threadIdx.x; i < bins * kSlab; i += blockDim.x) pooled[i] = T(0);
  __syncthreads();
  const int image = tables.image[box];
  const int channel = int(slab) * kSlab;
  const int count = call.channels - channel < kSlab ? call.channels - channel : kSlab;
  const MapView<const E>&a = call.map[0].level[level], &e = call.map[1].level[level];
  if (tables.sides == 1) {
    pool_box<E, T>(tables, 0, level, box, image, a, e, channel, count, T(1), pooled);
  } else {
    const MapView<const E> none{};
    pool_box<E, T>(tables, 0, level, box, image, a, none, channel, count, T(1), pooled);
    __syncthreads();  // the two sides may hand a column to different threads
    pool_box<E, T>(tables, 1, level, box, image, e, none, channel, count, T(-1), pooled);
  }
  __syncthreads();
  double sum = 0.0;
  for (int32_t i = threadIdx.x; i < bins * kSlab; i += blockDim.x) {
    sum += double(pooled[i]) * double(pooled[i]);
    if (call.pooled) call.pooled[entry * bins * kSlab + i] = T(2.0 * scale) * pooled[i];
  }
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) *partial = scale * sum;
}

// By one block. losses[k] = Σ partial, total = Σ losses; both in a fixed order.
template <class T>
struct SumLosses {
  const T* partial;
  int64_t boxes, parts;
  double* losses;
  double* total;
};

template <class T>
__global__ void sum_losses(SumLosses<T> call) {
  RAKD_SHARED(shared);
  double sum = 0.0;
  for (int64_t box = threadIdx.x; box < call.boxes; box += blockDim.x) {
    double loss = 0.0;
    for (int64_t i = 0; i < call.parts; ++i) loss += call.partial[box * call.parts + i];
    call.losses[box] = loss;
    sum += loss;
  }
  sum = block_sum(sum, reinterpret_cast<double*>(shared));
  if (threadIdx.x == 0) *call.total = sum;
}

template <class E>
struct AlignPool {
  typedef typename Accumulator<E>::type T;
  Tables<T> tables;
  Pyramid<const E> map;
  int32_t channels;
  E* output;  // [boxes, channels, bins_y, bins_x]
};

// Block (slab, box).
template <class E>
__global__ void align_pool(AlignPool<E> call) {
  typedef typename Accumulator<E>::type T;
  RAKD_SHARED(shared);
  const Tables<T>& tables = call.tables;
  const int32_t bins = tables.bins[0] * tables.bins[1];
  T* pooled = reinterpret_cast<T*>(shared);
  const int64_t slab = blockIdx.x, box = blockIdx.y + int64_t(blockIdx.z) * gridDim.y;
  if (box >= tables.boxes) return;
  for (int32_t i = threadIdx.x; i < bins * kSlab; i += blockDim.x) pooled[i] = T(0);
  __syncthreads();
  const int image = tables.image[box];
  const int channel = int(slab) * kSlab;
  const int count = call.channels - channel < kSlab ? call.channels - channel : kSlab;
  for (int level = 0; level < tables.levels; ++level) {
    const double scale = tables.scales[level * tables.boxes + box];
    if (scale == 0.0) continue;
    const MapView<const E> none{};
    pool_box<E, T>(tables, 0, level, box, image, call.map.level[level], none, channel, count, T(scale), pooled);
    __syncthreads();
  }
  E* out = call.output + (box * call.channels + channel) * bins;
  for (int32_t i = threadIdx.x; i < bins * count; i += blockDim.x) {
    narrow(pooled[(i % bins) * kSlab + i / bins], out + i);
  }
}

}  // namespace gpu
}  // namespace rakd
