// RoIAlign on the GPU: a block pools one box, for the loss on one level, for multi-level RoIAlign on all.
//
// A thread owns whole columns (bin p of x, channel c) of the pooled patch and walks them down, bin by bin: it sums each
// row of the support once, over the cells of its bin of x, and keeps the sums of the last two rows, which are all that
// a further bin may want again. Values stay in registers, and each sum has a fixed order. On their way to memory a few
// bins at a time pass through shared memory, so that neighbouring threads write neighbouring addresses.
#pragma once

#include "tables.cuh"

namespace rakd {
namespace gpu {

constexpr int kChannelBlock = 32;  // channels worked on together; the innermost dimension of pooled differences
constexpr int kStagePitch = kChannelBlock + 8;  // a warp's 4 bins by 8 channels (channels-first) hit different banks
constexpr int kTransposePitch = kChannelBlock + 1;  // where the stage is read along bins
constexpr int kStageBins = 8;                       // bins of y in the stage
constexpr int kPoolThreads = 128;                   // of a pooling block at most, for registers
constexpr int kMaxWarps = 32;                       // of any block

RAKD_HD int32_t channel_blocks(int32_t channels) { return (channels + kChannelBlock - 1) / kChannelBlock; }

// Columns (bins of x) that a thread block takes at a time, each with a block of channels.
RAKD_HD int32_t columns_of(int threads, int32_t bins_x) {
  const int32_t most = threads / kChannelBlock;
  return most < bins_x ? most : bins_x;
}

// Shared memory of a pooling block: [kMaxWarps] doubles, then the stage [kStageBins, columns, kStagePitch].
template <class T>
RAKD_HD size_t pool_shared_bytes(int threads, int32_t bins_x) {
  return kMaxWarps * sizeof(double) + size_t(kStageBins) * columns_of(threads, bins_x) * kStagePitch * sizeof(T);
}

// The column and channel of a thread, such that neighbouring threads read neighbouring addresses of the maps.
struct ThreadMap {
  int32_t column, channel;
  bool used;  // whether there is such a place among `columns` by kChannelBlock

  __device__ ThreadMap(int32_t columns, bool channels_inner) {
    const int32_t thread = int32_t(threadIdx.x);
    column = channels_inner ? thread / kChannelBlock : thread % columns;
    channel = channels_inner ? thread % kChannelBlock : thread / columns;
    used = column < columns && channel < kChannelBlock;
  }
};

// One column of RoIAlign of one box, channel and bin of x, read bin by bin downwards. kDifference: a second map of the
// same shape and element type is subtracted at load.
//
// The first cells that the bin weighs stay in registers, so that the loads of a row are all under way together.
template <class T, class E, bool kDifference>
class Column {
 public:
  __device__ Column(const AxisTable<T>& y, const AxisTable<T>& x, int32_t bin_x, int64_t image, int64_t channel,
                    const MapView& a, const MapView& b)
      : y_(y),
        cell_(x.cell + x.bin_cell[bin_x]),
        weight_(x.pool + x.bin_offset[bin_x]),
        taps_(x.bin_offset[bin_x + 1] - x.bin_offset[bin_x]),
        plane_{a.plane<const E>(image, channel), kDifference ? b.plane<const E>(image, channel) : nullptr},
        row_stride_{a.row_stride, b.row_stride},
        column_stride_{a.column_stride, b.column_stride} {
    for (int map = 0; map < kMaps; ++map) RAKD_OPAQUE(plane_[map]);
    RAKD_KEEP(y_.cell);
    RAKD_KEEP(y_.pool);
    RAKD_UNROLL
    for (int t = 0; t < kStored; ++t) {
      const bool there = t < taps_;
      stored_weight_[t] = there ? weight_[t] : T(0);
      for (int map = 0; map < kMaps; ++map) stored_at_[map][t] = there ? uint32_t(cell_[t]) * column_stride_[map] : 0;
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
  static constexpr int kStored = 4;  // all that a bin weighs at a sampling ratio of 2
  static constexpr int kMaps = kDifference ? 2 : 1;

  __device__ T row_sum(int32_t y) const {
    const E* row[2];
    for (int map = 0; map < kMaps; ++map) {
      row[map] = plane_[map] + uint64_t(uint32_t(y)) * row_stride_[map];
      RAKD_OPAQUE(row[map]);
    }
    T sum = T(0);
    RAKD_UNROLL
    for (int t = 0; t < kStored; ++t) {
      if (t >= taps_) continue;
      T value = to_accum(row[0][stored_at_[0][t]]);
      if (kDifference) value -= to_accum(row[1][stored_at_[1][t]]);
      sum += stored_weight_[t] * value;
    }
    for (int32_t t = kStored; t < taps_; ++t) {
      T value = to_accum(row[0][uint32_t(cell_[t]) * column_stride_[0]]);
      if (kDifference) value -= to_accum(row[1][uint32_t(cell_[t]) * column_stride_[1]]);
      sum += weight_[t] * value;
    }
    return sum;
  }

  AxisTable<T> y_;
  const int32_t* cell_;
  const T* weight_;
  int32_t taps_;
  const E* plane_[2];
  uint32_t row_stride_[2], column_stride_[2];
  T stored_weight_[kStored];
  uint32_t stored_at_[kMaps][kStored];
  int32_t row_ = -1;  // number of the last row in the support; its sum and that of the row before it
  T value_ = T(0), before_ = T(0);
};

// A part of one column of a pooled patch: bins top .. top + height - 1 of y.
struct Patch {
  int64_t box;
  int32_t channel, bin_x, top, height;
};

// Calls f(q, value) for the bins of the patch, q from 0 on. kDifference: of map[0] - map[1], else of map[0].
template <bool kDifference, class T, class F>
__device__ __forceinline__ void pool_column(const Tables<T>& tables, int side, int level, const Patch& at,
                                            const Pyramid* map, const F& f) {
  const int64_t image = int64_t(tables.rows[at.box * (5 + tables.levels)]);
  const MapView &first = map[0].level[level], &second = map[kDifference ? 1 : 0].level[level];
  with_element_type<T>(map->type[level], [&](auto element) {
    Column<T, decltype(element), kDifference> column(tables.axis(side, level, 0, at.box),
                                                     tables.axis(side, level, 1, at.box), at.bin_x, image, at.channel,
                                                     first, second);
    for (int32_t q = 0; q < at.height; ++q) f(q, column(at.top + q));
  });
}

// Sum over the block in a fixed order; the result is thread 0's. blockDim is a multiple of 32; sums[] is shared memory.
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

template <class T>
struct RoiAlignForward {
  Tables<T> tables;
  Pyramid map[2];   // for the loss the apprentice's and the expert's, else the first
  int32_t group;    // channel blocks that one thread block takes
  double* partial;  // out [thread blocks]: losses
  T* pooled;     // out, per level [K, channel blocks, bins, kChannelBlock]: 2 * scale * difference; nullptr: not wanted
  void* output;  // out [K, channels, bins_y, bins_x], of the maps' element type: the pooled features
};

// Thread blocks of a box on one level.
RAKD_HD int32_t groups_of(const Level& level, int32_t group) {
  return (channel_blocks(level.channels) + group - 1) / group;
}

// kLoss: block (level, box, group of channel blocks), the loss and the pooled differences that the gradient is made
// from. Where maps of one level differ in shape or element type, either is pooled by itself and the results are
// subtracted. Else: block (box, group of channel blocks), multi-level RoIAlign, the sum over levels of scale * pooled.
template <class T, bool kLoss>
__global__ void __launch_bounds__(kPoolThreads, kLoss && sizeof(T) == 8 ? 4 : 6)
    roi_align_forward(RoiAlignForward<T> call) {
  RAKD_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared);
  T* stage = reinterpret_cast<T*>(sums + kMaxWarps);
  const Tables<T>& tables = call.tables;
  int level = 0;
  int64_t number = blockIdx.x;
  while (kLoss && number >= tables.boxes * groups_of(tables.level[level], call.group)) {
    number -= tables.boxes * groups_of(tables.level[level++], call.group);
  }
  const Level& shape = tables.level[level];
  const int32_t groups = groups_of(shape, call.group), first = int32_t(number % groups) * call.group;
  const int64_t box = number / groups;
  const double scale = tables.scales[level * tables.boxes + box];
  if (kLoss && scale == 0.0) {  // the gradient kernel skips this box as well
    if (threadIdx.x == 0) call.partial[blockIdx.x] = 0.0;
    return;
  }

  const int32_t bins_y = tables.bins[0], bins_x = tables.bins[1], columns = columns_of(int(blockDim.x), bins_x);
  const ThreadMap thread(columns, call.map[0].level[level].channel_stride == 1);
  constexpr int kPitch = kLoss ? kStagePitch : kTransposePitch;
  T* own = stage + thread.column * kPitch + thread.channel;  // [kStageBins], `step` apart
  const int32_t step = columns * kPitch, blocks = channel_blocks(shape.channels);
  double sum = 0.0;
  for (int32_t block = first; block < first + call.group && block < blocks; ++block) {
    const int32_t count = min(shape.channels - block * kChannelBlock, kChannelBlock);
    for (int32_t left = 0; left < bins_x; left += columns) {
      const int32_t width = min(bins_x - left, columns);
      for (int32_t top = 0; top < bins_y; top += kStageBins) {
        const int32_t height = min(bins_y - top, kStageBins);
        const bool real = thread.used && thread.column < width && thread.channel < count;
        const Patch patch{box, block * kChannelBlock + thread.channel, left + thread.column, top, height};
        T squares = T(0);                       // few enough for T; double is slow on many GPUs
        if (thread.used && !(kLoss && real)) {  // channels past the last are written as well
          for (int32_t q = 0; q < height; ++q) own[q * step] = T(0);
        }
        if (kLoss && real) {
          const auto keep = [&](int32_t q, T difference) {
            squares += difference * difference;
            if (call.pooled) own[q * step] = T(2.0 * scale) * difference;
          };
          if (shape.sides == 1 && call.map[0].type[level] == call.map[1].type[level]) {
            pool_column<true>(tables, 0, level, patch, call.map, keep);
          } else {
            pool_column<false>(tables, 0, level, patch, call.map, [&](int32_t q, T value) { own[q * step] = value; });
            pool_column<false>(tables, shape.sides - 1, level, patch, call.map + 1,
                               [&](int32_t q, T value) { keep(q, own[q * step] - value); });
          }
        } else if (real) {
          for (int l = 0; l < tables.levels; ++l) {
            const double weight = tables.scales[l * tables.boxes + box];
            if (weight == 0.0) continue;
            pool_column<false>(tables, 0, l, patch, call.map,
                               [&](int32_t q, T value) { own[q * step] += T(weight) * value; });
          }
        }
        sum += double(squares);
        if (kLoss && !call.pooled) continue;
        __syncthreads();
        if constexpr (kLoss) {
          static_assert(kChannelBlock == 32, "each lane has a channel");
          const int64_t entry = (box * blocks + block) * bins_y + top;  // rows of bins before these
          for (int32_t q = threadIdx.x / 32; q < height; q += blockDim.x / 32) {
            const T* from = stage + q * step + threadIdx.x % 32;
            T* to = call.pooled + shape.pooled + ((entry + q) * bins_x + left) * kChannelBlock + threadIdx.x % 32;
            for (int32_t i = 0; i < width; ++i) to[i * kChannelBlock] = from[i * kPitch];
          }
        } else {
          const int64_t entry = box * shape.channels + block * kChannelBlock;
          with_element_type<T>(call.map[0].type[0], [&](auto element) {
            auto* output = static_cast<decltype(element)*>(call.output);
            for (int32_t i = threadIdx.x; i < count * height * width; i += blockDim.x) {
              const int32_t p = i % width, q = i / width % height, c = i / width / height;
              from_accum(stage[q * step + p * kPitch + c],
                         output + ((entry + c) * bins_y + top + q) * bins_x + left + p);
            }
          });
        }
        __syncthreads();  // the stage is written anew
      }
    }
  }
  if constexpr (kLoss) {
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) call.partial[blockIdx.x] = scale * sum;
  }
}

// losses[k] = sum of the box's parts, total = sum of losses; both in a fixed order.
template <class T>
struct SumLosses {
  const double* partial;  // [thread blocks of roi_align_forward]
  int32_t group;          // as there
  T* losses;              // out [K]; nullptr: not wanted
  T* total;               // out [1]; nullptr: nothing to add
};

// By one block; sums[] is shared memory of a number a warp.
template <class T>
__device__ void add_losses(const Tables<T>& tables, const SumLosses<T>& call, double* sums) {
  double sum = 0.0;
  for (int64_t box = threadIdx.x; box < tables.boxes; box += blockDim.x) {
    double loss = 0.0;
    const double* partial = call.partial;
    for (int level = 0; level < tables.levels; ++level) {
      const int32_t groups = groups_of(tables.level[level], call.group);
      for (int32_t i = 0; i < groups; ++i) loss += partial[box * groups + i];
      partial += tables.boxes * groups;
    }
    if (call.losses) call.losses[box] = T(loss);
    sum += loss;
  }
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) *call.total = T(sum);
}

}  // namespace gpu
}  // namespace rakd
