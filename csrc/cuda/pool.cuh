// Pooling on the GPU: RoIAlign of one box by a block, which makes the box's tables itself.
//
// A thread owns whole columns (bin p of x, channel c) of the pooled patch and walks them down, bin by bin: it sums each
// touched row once, over the cells of its bin of x, and keeps the last two rows' sums, which are all that a further bin
// may want again. Values stay in registers: no thread needs another's numbers, and each sum has a fixed order. Where
// they go to memory, a few bins at a time pass through shared memory, so that neighbours are written by neighbours.
#pragma once

#include "elements.cuh"

namespace rakd {
namespace gpu {

constexpr int kSlab = 32;          // channels worked on together; the innermost dimension of pooled differences
constexpr int kPitch = kSlab + 8;  // of the stage: a warp's 4 bins by 8 channels (channels-first) meet different banks
constexpr int kRowPitch = kSlab + 1;  // of the stage that is read along bins
constexpr int kStageBins = 8;         // bins of y in the stage
constexpr int kPoolThreads = 128;     // of a pooling block at most, for registers
constexpr int kMaxThreads = 1024;     // of any block

RAKD_HD int64_t slabs_of(int64_t channels) { return (channels + kSlab - 1) / kSlab; }

// Columns (bins of x) that a block's threads take at a time, with a slab of channels each.
RAKD_HD int32_t columns_of(int threads, int32_t bins_x) {
  const int32_t most = threads / kSlab;
  return most < bins_x ? most : bins_x;
}

// The block's shared memory, in this order.
template <class T>
struct PoolMemory {
  double* sums;    // [kMaxThreads / 32]
  double* scales;  // [kMaxLevels]
  T* stage;        // [kStageBins, columns, kPitch], or kRowPitch
  T* weights;      // the rooms of the block's levels, where tables are in shared memory
  int32_t* ints;
};

// Bytes of shared memory, with rooms of so many elements.
template <class T>
RAKD_HD size_t pool_shared_bytes(int threads, int32_t bins_x, int64_t room_ints, int64_t room_weights) {
  const size_t stage = size_t(kStageBins) * size_t(columns_of(threads, bins_x)) * kPitch;
  return (kMaxThreads / 32 + kMaxLevels) * sizeof(double) + (stage + size_t(room_weights)) * sizeof(T) +
         size_t(room_ints) * sizeof(int32_t);
}

template <class T>
__device__ PoolMemory<T> pool_memory(unsigned char* shared, int32_t columns, int64_t room_weights) {
  PoolMemory<T> memory;
  memory.sums = reinterpret_cast<double*>(shared);
  memory.scales = memory.sums + kMaxThreads / 32;
  memory.stage = reinterpret_cast<T*>(memory.scales + kMaxLevels);
  memory.weights = memory.stage + kStageBins * columns * kPitch;
  memory.ints = reinterpret_cast<int32_t*>(memory.weights + room_weights);
  return memory;
}

// What a thread owns: bins of x by channels of a slab, such that neighbouring threads read neighbouring addresses.
struct Owner {
  int32_t column, channel;
  bool mine;  // whether there is such a place among `columns` by kSlab

  __device__ Owner(int32_t columns, bool channels_inner) {
    const int32_t tid = int32_t(threadIdx.x);
    column = channels_inner ? tid / kSlab : tid % columns;
    channel = channels_inner ? tid % kSlab : tid / columns;
    mine = column < columns && channel < kSlab;
  }
};

// One column of RoIAlign of one box, channel and bin of x, read bin by bin downwards. kDifference: a second map of the
// same shape is taken off the first at load.
//
// The first cells that a bin weighs stay in registers, so that a row's loads are all under way together. Their offsets
// in a row are of 32 bits (check_strides() of tensors.h).
template <class E, bool kDifference>
class Column {
 public:
  typedef typename Accumulator<E>::type T;

  __device__ Column(const AxisTable<T>& y, const AxisTable<T>& x, int32_t bin_x, int64_t image, int64_t channel,
                    const MapView<const E>& a, const MapView<const E>& b)
      : y_(y),
        cell_(x.cell + x.bin_cell[bin_x]),
        weight_(x.pool + x.bin_offset[bin_x]),
        taps_(x.bin_offset[bin_x + 1] - x.bin_offset[bin_x]),
        first_{a.data + image * a.stride[0] + channel * a.stride[1],
               kDifference ? b.data + image * b.stride[0] + channel * b.stride[1] : nullptr},
        row_stride_{uint32_t(a.stride[2]), uint32_t(b.stride[2])},
        stride_{uint32_t(a.stride[3]), uint32_t(b.stride[3])} {
    for (int map = 0; map < kMaps; ++map) RAKD_OPAQUE(first_[map]);
    RAKD_KEEP(y_.cell);
    RAKD_KEEP(y_.pool);
    RAKD_UNROLL
    for (int t = 0; t < kKept; ++t) {
      const bool there = t < taps_;
      kept_weight_[t] = there ? weight_[t] : T(0);
      for (int map = 0; map < kMaps; ++map) kept_at_[map][t] = there ? uint32_t(cell_[t]) * stride_[map] : 0;
    }
  }

  // The value of bin q. Bins are asked for in order.
  __device__ T operator()(int32_t q) {
    T sum = T(0);
    const int32_t begin = y_.bin_offset[q], end = y_.bin_offset[q + 1], first = y_.bin_cell[q] - begin;
    for (int32_t j = begin; j < end; ++j) {
      const int32_t row = first + j;
      if (row > row_) {
        before_ = value_;
        value_ = row_sum(y_.cell[row]);
        row_ = row;
      }
      sum += y_.pool[j] * (row == row_ ? value_ : before_);
    }
    return sum;
  }

 private:
  static constexpr int kKept = 4;  // all that a bin weighs at a sampling ratio of 2
  static constexpr int kMaps = kDifference ? 2 : 1;

  __device__ T row_sum(int32_t y) const {
    const E* row[2];
    for (int map = 0; map < kMaps; ++map) {
      row[map] = first_[map] + uint64_t(uint32_t(y)) * row_stride_[map];
      RAKD_OPAQUE(row[map]);
    }
    T sum = T(0);
    RAKD_UNROLL
    for (int t = 0; t < kKept; ++t) {
      if (t >= taps_) continue;
      T value = widen(row[0][kept_at_[0][t]]);
      if (kDifference) value -= widen(row[1][kept_at_[1][t]]);
      sum += kept_weight_[t] * value;
    }
    for (int32_t t = kKept; t < taps_; ++t) {
      T value = widen(row[0][uint32_t(cell_[t]) * stride_[0]]);
      if (kDifference) value -= widen(row[1][uint32_t(cell_[t]) * stride_[1]]);
      sum += weight_[t] * value;
    }
    return sum;
  }

  AxisTable<T> y_;
  const int32_t* cell_;
  const T* weight_;
  int32_t taps_;
  const E* first_[2];
  uint32_t row_stride_[2], stride_[2];  // from row to row, from cell to cell
  T kept_weight_[kKept];
  uint32_t kept_at_[kMaps][kKept];
  int32_t row_ = -1;  // among the touched ones; its sum and that of the one before it
  T value_ = T(0), before_ = T(0);
};

// Sum over the block in a fixed order; the result is thread 0's. blockDim is a multiple of 32.
__device__ __forceinline__ double block_sum(double value, double* sums) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) total += sums[warp];
  }
  return total;
}

template <class E>
struct DistillPool {
  typedef typename Accumulator<E>::type T;
  Tables<T> tables;
  Pyramid<const E> map[2];
  int32_t channels;
  int32_t group;    // slabs of a block
  double* partial;  // out [boxes, levels, groups]: losses
  T* pooled;        // out [levels, boxes, slabs, bins, kSlab]: 2 * scale * difference; nullptr: not wanted
};

// Block (group of slabs, box, level). Leaves losses, and for gradients the pooled differences and the box's tables.
// kTwoSides: the maps have tables of their own, so they are pooled apart.
template <class E, bool kTwoSides>
__global__ void __launch_bounds__(kPoolThreads, kTwoSides || sizeof(typename Accumulator<E>::type) == 8 ? 4 : 6)
    distill_pool(DistillPool<E> call) {
  typedef typename Accumulator<E>::type T;
  RAKD_SHARED(shared);
  const Tables<T>& tables = call.tables;
  const int64_t box = blockIdx.y + int64_t(blockIdx.z / tables.levels) * gridDim.y;
  const int level = int(blockIdx.z % tables.levels);
  if (box >= tables.boxes) return;
  const int32_t bins_y = tables.bins[0], bins_x = tables.bins[1], columns = columns_of(int(blockDim.x), bins_x);
  const PoolMemory<T> memory = pool_memory<T>(shared, columns, tables.in_shared ? tables.level[level].weights : 0);
  const Room<T> room = tables.in_shared ? Room<T>{memory.ints, memory.weights} : workspace_room(tables, level, box);
  make_box_tables(tables, level, level + 1, box, [&](int) { return room; }, memory.scales);
  const double scale = memory.scales[level];
  if (tables.extents && blockIdx.x == 0) publish(tables, level, box, room, scale);
  double* partial = call.partial + (box * tables.levels + level) * gridDim.x + blockIdx.x;
  if (scale == 0.0) {  // the gradient kernel skips this box as well
    if (threadIdx.x == 0) *partial = 0.0;
    return;
  }

  const MapView<const E>&a = call.map[0].level[level], &e = call.map[1].level[level];
  const Owner owner(columns, a.stride[1] == 1);
  const AxisTable<T> y = axis_table(tables, 0, level, 0, room), x = axis_table(tables, 0, level, 1, room);
  const int side = kTwoSides ? 1 : 0;
  const AxisTable<T> ey = axis_table(tables, side, level, 0, room), ex = axis_table(tables, side, level, 1, room);
  const int64_t image = int64_t(tables.rows[5 * box]), slabs = slabs_of(call.channels);
  const int64_t first_slab = int64_t(blockIdx.x) * call.group;
  double sum = 0.0;
  for (int64_t slab = first_slab; slab < first_slab + call.group && slab < slabs; ++slab) {
    const int64_t channel = slab * kSlab + owner.channel;
    const int64_t entry = (level * tables.boxes + box) * slabs + slab;
    for (int32_t left = 0; left < bins_x; left += columns) {
      const int32_t p = left + owner.column, width = bins_x - left < columns ? bins_x - left : columns;
      const bool mine = owner.mine && owner.column < width, real = mine && channel < call.channels;
      // Threads without a column read along with the first.
      const int32_t bin = real ? p : 0;
      const int64_t plane = real ? channel : 0;
      Column<E, !kTwoSides> one(y, x, bin, image, plane, a, e);
      Column<E, false> other(ey, ex, bin, image, plane, e, e);
      for (int32_t top = 0; top < bins_y; top += kStageBins) {
        const int32_t height = bins_y - top < kStageBins ? bins_y - top : kStageBins;
        T squares = T(0);  // few enough for T; double is slow on many GPUs
        for (int32_t q = 0; q < height; ++q) {
          T difference = T(0);
          if (real) {
            difference = one(top + q);
            if (kTwoSides) difference -= other(top + q);
          }
          squares += difference * difference;
          if (call.pooled && mine) {
            memory.stage[(q * columns + owner.column) * kPitch + owner.channel] = T(2.0 * scale) * difference;
          }
        }
        sum += double(squares);
        if (!call.pooled) continue;
        __syncthreads();
        static_assert(kSlab == 32, "each lane has a channel");
        for (int32_t q = threadIdx.x / 32; q < height; q += blockDim.x / 32) {
          const T* from = memory.stage + q * columns * kPitch + threadIdx.x % 32;
          T* to = call.pooled + ((entry * bins_y + top + q) * bins_x + left) * kSlab + threadIdx.x % 32;
          for (int32_t i = 0; i < width; ++i) to[i * kSlab] = from[i * kPitch];
        }
        __syncthreads();
      }
    }
  }
  sum = block_sum(sum, memory.sums);
  if (threadIdx.x == 0) *partial = scale * sum;
}

// losses[k] = Σ partial, total = Σ losses; both in a fixed order.
template <class T>
struct SumLosses {
  const T* partial;
  int64_t boxes, parts;
  double* losses;
  double* total;
};

// By one block; `sums` is shared memory of a number a warp.
template <class T>
__device__ void add_losses(const SumLosses<T>& call, double* sums) {
  double sum = 0.0;
  for (int64_t box = threadIdx.x; box < call.boxes; box += blockDim.x) {
    double loss = 0.0;
    for (int64_t i = 0; i < call.parts; ++i) loss += call.partial[box * call.parts + i];
    call.losses[box] = loss;
    sum += loss;
  }
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) *call.total = sum;
}

// The sum by itself, where there is no gradient kernel to do it.
template <class T>
__global__ void sum_losses(SumLosses<T> call) {
  RAKD_SHARED(shared);
  add_losses(call, reinterpret_cast<double*>(shared));
}

template <class E>
struct AlignPool {
  typedef typename Accumulator<E>::type T;
  Tables<T> tables;
  Pyramid<const E> map;
  int32_t channels;
  int32_t group;  // slabs of a block
  E* output;      // [boxes, channels, bins_y, bins_x]
};

// Block (group of slabs, box).
template <class E>
__global__ void align_pool(AlignPool<E> call) {
  typedef typename Accumulator<E>::type T;
  RAKD_SHARED(shared);
  const Tables<T>& tables = call.tables;
  const int64_t box = blockIdx.y + int64_t(blockIdx.z) * gridDim.y;
  if (box >= tables.boxes) return;
  const int32_t bins_y = tables.bins[0], bins_x = tables.bins[1], columns = columns_of(int(blockDim.x), bins_x);
  const LevelLayout& last = tables.level[tables.levels - 1];
  const PoolMemory<T> memory =
      pool_memory<T>(shared, columns, tables.in_shared ? last.weights_before + last.weights : 0);
  const auto room_of = [&](int level) {
    if (!tables.in_shared) return workspace_room(tables, level, box);
    const LevelLayout& at = tables.level[level];
    return Room<T>{memory.ints + at.ints_before, memory.weights + at.weights_before};
  };
  make_box_tables(tables, 0, tables.levels, box, room_of, memory.scales);

  const Owner owner(columns, call.map.level[0].stride[1] == 1);
  const int64_t slabs = slabs_of(call.channels), first_slab = int64_t(blockIdx.x) * call.group;
  for (int64_t slab = first_slab; slab < first_slab + call.group && slab < slabs; ++slab) {
    const int64_t channel = slab * kSlab + owner.channel;
    const int32_t count = int32_t(call.channels - slab * kSlab < kSlab ? call.channels - slab * kSlab : kSlab);
    for (int32_t left = 0; left < bins_x; left += columns) {
      const int32_t width = bins_x - left < columns ? bins_x - left : columns;
      const bool real = owner.mine && owner.column < width && owner.channel < count;
      for (int32_t top = 0; top < bins_y; top += kStageBins) {
        const int32_t height = bins_y - top < kStageBins ? bins_y - top : kStageBins;
        T* mine = memory.stage + owner.column * kRowPitch + owner.channel;  // [kStageBins], columns * kRowPitch apart
        if (real) {
          for (int32_t q = 0; q < height; ++q) mine[q * columns * kRowPitch] = T(0);
          for (int level = 0; level < tables.levels; ++level) {
            const double scale = memory.scales[level];
            if (scale == 0.0) continue;
            const int64_t image = int64_t(tables.rows[5 * box]);
            const Room<T> room = room_of(level);
            const MapView<const E>& map = call.map.level[level];
            Column<E, false> column(axis_table(tables, 0, level, 0, room), axis_table(tables, 0, level, 1, room),
                                    left + owner.column, image, channel, map, map);
            for (int32_t q = 0; q < height; ++q) mine[q * columns * kRowPitch] += T(scale) * column(top + q);
          }
        }
        __syncthreads();
        for (int32_t i = threadIdx.x; i < count * height * width; i += blockDim.x) {
          const int32_t from = i % width, q = i / width % height, c = i / width / height;
          E* to = call.output + ((box * call.channels + slab * kSlab + c) * bins_y + top + q) * bins_x + left + from;
          narrow(memory.stage[(q * columns + from) * kRowPitch + c], to);
        }
        __syncthreads();
      }
    }
  }
}

}  // namespace gpu
}  // namespace rakd
