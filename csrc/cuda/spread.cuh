// Gradients on the GPU. A block owns a tile of one map's gradient and one slab of channels: it gathers what all boxes
// put there and writes each element once, zeros included. No atomics, and boxes add up in their order.
//
// A warp owns a row of the tile. For each box that meets the tile it mixes the bins of y that feed its row into one row
// of bins of x, in shared memory of its own, from which each lane then takes the bins that feed its cell.
#pragma once

#include "pool.cuh"

namespace rakd {
namespace gpu {

constexpr int kSpreadThreads = 256;   // of a block at most; two of them fit a processor's registers, of float64 one
constexpr int kTileColumns = 32;      // a warp's lanes lie side by side in a row of the tile
constexpr int kMixBins = 16;          // bins of x that a warp mixes between barriers
constexpr int kMixPitch = kSlab + 4;  // of the mixed row: whole Quads, and bins side by side meet different banks

template <class E>
struct Spread {
  typedef typename Accumulator<E>::type T;
  Tables<T> tables;
  // Out: the gradients of the apprentice's and of the expert's maps, the latter with the opposite sign. Where the two
  // share their tables, one block writes to both.
  Pyramid<E> gradient[2];
  int32_t first_tile[2 * kMaxLevels + 1];  // of side and level, then the end; image-major. One block more adds losses
  int32_t channels;
  const T* pooled;           // [levels, boxes, slabs, bins, kSlab], scaled; or nullptr
  const E* output_gradient;  // [boxes, channels, bins_y, bins_x], not scaled
  SumLosses<double> sum;     // total == nullptr: nothing to add
};

// A box that puts something into the tile.
struct Meeting {
  int32_t box;                 // from the first candidate
  int32_t row, column;         // first touched row and column of the tile, by their numbers in the box's tables
  uint32_t rows, columns;      // those of the tile that are touched, a bit each
  int32_t first_bin, end_bin;  // of x: those that feed the tile
};

template <class T>
RAKD_HD size_t spread_shared_bytes(int threads) {
  const size_t warps = size_t(threads) / 32;
  return warps * (kMixBins * kMixPitch * sizeof(T) + sizeof(double)) + size_t(threads) * sizeof(Meeting);
}

// Number of the first that is not less; values never decrease.
RAKD_HD int32_t lower_bound(const int32_t* values, int32_t low, int32_t high, int32_t value) {
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (values[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// What a tile of one image of one level is about.
struct Tile {
  int32_t image, top, left, rows, columns;
};

// Whether a box, of the extent that publish_extent() left, may put something into the tile. Values of an extent lie
// `boxes` apart.
RAKD_HD bool extent_meets(const int32_t* extent, int64_t boxes, const Tile& tile) {
  if (extent[0] != tile.image) return false;
  if (extent[boxes] >= tile.top + tile.rows || extent[2 * boxes] < tile.top) return false;
  return extent[3 * boxes] < tile.left + tile.columns && extent[4 * boxes] >= tile.left;
}

// Bits of the touched cells from number `begin` on that lie before `low + size`, from `low` on; size is at most 32.
RAKD_HD uint32_t touched_bits(const int32_t* cells, int32_t begin, int32_t count, int32_t low, int32_t size) {
  uint32_t bits = 0;
  for (int32_t t = begin; t < count && cells[t] < low + size; ++t) bits |= uint32_t(1) << (cells[t] - low);
  return bits;
}

// Bits below `place`.
RAKD_HD uint32_t bits_below(int32_t place) { return (uint32_t(1) << place) - 1; }

// Whether `box` puts something into the tile, and where to look for it.
template <class T>
__device__ bool meet(const Tables<T>& tables, int side, int level, int64_t box, const Tile& tile, Meeting* found) {
  const int32_t* extent = tables.extents + int64_t(side * tables.levels + level) * kExtent * tables.boxes + box;
  if (!extent_meets(extent, tables.boxes, tile)) return false;
  const Room<T> room = workspace_room(tables, level, box);
  const AxisTable<T> y = axis_table(tables, side, level, 0, room), x = axis_table(tables, side, level, 1, room);
  found->row = lower_bound(y.cell, 0, *y.count, tile.top);
  found->rows = touched_bits(y.cell, found->row, *y.count, tile.top, tile.rows);
  found->column = lower_bound(x.cell, 0, *x.count, tile.left);
  found->columns = touched_bits(x.cell, found->column, *x.count, tile.left, tile.columns);
  if (found->rows == 0 || found->columns == 0) return false;
  const int32_t end = found->column + __popc(found->columns);
  found->first_bin = x.cell_bin[found->column];
  found->end_bin = lower_bound(x.bin_cell, found->first_bin, tables.bins[1], end);
  return true;
}

// The number of set flags of the threads before this one, and of all. Called by the whole block; has a barrier, and
// counts[] must not be written before another one.
__device__ __forceinline__ int32_t rank_in_block(bool flag, int32_t* counts, int32_t* total) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  int32_t sum = flag ? 1 : 0;
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_sync(0xffffffffu, sum, lane >= step ? lane - step : lane);
    if (lane >= step) sum += other;
  }
  if (lane == 31) counts[warp] = sum;
  __syncthreads();
  int32_t before = 0;
  *total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) before += counts[w];
    *total += counts[w];
  }
  return before + sum - (flag ? 1 : 0);
}

// Four values moved as one or two 16-byte words.
template <class T>
struct alignas(16) Quad {
  T value[4];
};

// Neighbouring channels, moved in words of up to 16 bytes where they lie together.
template <class E, int kCount>
struct alignas(kCount * sizeof(E) < 16 ? kCount * sizeof(E) : 16) Channels {
  E value[kCount];
};

// Writes sign * sum for the first `channels` of so many of a pixel.
template <int kCount, class E, class T>
__device__ __forceinline__ void write_channels(const T* sum, T sign, E* out, int64_t stride, int32_t channels) {
  typedef Channels<E, kCount> Together;
  if (stride == 1 && channels == kCount && reinterpret_cast<uintptr_t>(out) % alignof(Together) == 0) {
    Together together;
    RAKD_UNROLL
    for (int c = 0; c < kCount; ++c) narrow(sign * sum[c], &together.value[c]);
    *reinterpret_cast<Together*>(out) = together;
    return;
  }
  RAKD_UNROLL
  for (int c = 0; c < kCount; ++c) {
    if (c < channels) narrow(sign * sum[c], out + c * stride);
  }
}

// Values of the bins that feed a cell, from[i * stride], weighted.
template <class E, class T, class GetTable>
__device__ __forceinline__ T mix(const Feed<T>& feed, const GetTable& table, int32_t cell, const E* from,
                                 int64_t stride) {
  constexpr int kKept = Feed<T>::kKept;
  T sum = T(0);
  RAKD_UNROLL
  for (int i = 0; i < kKept; ++i) {
    if (i < feed.count) sum += feed.kept[i] * widen(from[i * stride]);
  }
  RAKD_ROLLED
  for (int32_t i = kKept; i < feed.count; ++i) sum += table().weight(feed.first + i, cell) * widen(from[i * stride]);
  return sum;
}

// A channel of the mixed row of `width` bins of x, from kBins bins of y that lie `next` apart. The loads of several
// bins of x are under way together.
template <int kBins, class T>
__device__ __forceinline__ void mix_kept(const Feed<T>& feed, const T* from, int64_t next, int32_t width, T* to) {
  constexpr int kTogether = 4;
  const T* row[kBins];
  RAKD_UNROLL
  for (int b = 0; b < kBins; ++b) {
    row[b] = from + b * next;
    RAKD_OPAQUE(row[b]);
  }
  RAKD_ROLLED
  for (; width > 0; width -= kTogether) {
    T value[kTogether][kBins];
    RAKD_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      if (i >= width) continue;
      RAKD_UNROLL
      for (int b = 0; b < kBins; ++b) value[i][b] = row[b][i * kSlab];
    }
    RAKD_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      if (i >= width) continue;
      T sum = T(0);
      RAKD_UNROLL
      for (int b = 0; b < kBins; ++b) sum += feed.kept[b] * value[i][b];
      to[i * kMixPitch] = sum;
    }
    RAKD_UNROLL
    for (int b = 0; b < kBins; ++b) row[b] += kTogether * kSlab;
    to += kTogether * kMixPitch;
  }
}

// Block (tile of all sides, levels and images, slab); blockDim.x is a multiple of 32. kPooled: from pooled differences,
// else from the output's gradient.
template <class E, bool kPooled>
__global__ void __launch_bounds__(kSpreadThreads, sizeof(typename Accumulator<E>::type) == 4 ? 2 : 1)
    spread(Spread<E> call) {
  typedef typename Accumulator<E>::type T;
  RAKD_SHARED(shared);
  const Tables<T>& tables = call.tables;
  const int32_t bins_y = tables.bins[0], bins_x = tables.bins[1], bins = bins_y * bins_x;
  const int warps = int(blockDim.x) / 32, lane = int(threadIdx.x) % 32;
  // By way of a shuffle, so that compilers know it for the same in all lanes, and keep it.
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  T* mixed = reinterpret_cast<T*>(shared);  // [kMixBins, kMixPitch] a warp
  double* sums = reinterpret_cast<double*>(mixed + warps * kMixBins * kMixPitch);
  Meeting* meetings = reinterpret_cast<Meeting*>(sums + warps);
  int32_t* counts = reinterpret_cast<int32_t*>(sums);
  mixed += warp * kMixBins * kMixPitch;

  const int32_t slab = int32_t(blockIdx.y), number = int32_t(blockIdx.x);
  if (number == call.first_tile[tables.sides * tables.levels]) {
    if (slab == 0 && call.sum.total) add_losses(call.sum, sums);
    return;
  }
  int map = 0;
  while (number >= call.first_tile[map + 1]) ++map;
  const int side = map / tables.levels, level = map % tables.levels;
  const int32_t height = tables.size[side][level][0], width = tables.size[side][level][1];
  const int32_t tiles_x = (width + kTileColumns - 1) / kTileColumns, tiles_y = (height + warps - 1) / warps;
  const int32_t within = number - call.first_tile[map];
  const Tile tile{within / (tiles_x * tiles_y), within / tiles_x % tiles_y * warps, within % tiles_x * kTileColumns,
                  warps, kTileColumns};
  const int32_t y = tile.top + warp, x = tile.left + lane;
  const int64_t slabs = slabs_of(call.channels);
  const int32_t channels = call.channels - slab * kSlab < kSlab ? call.channels - slab * kSlab : kSlab;

  T sum[kSlab];
  RAKD_UNROLL
  for (int c = 0; c < kSlab; ++c) sum[c] = T(0);

  // Of box 0; those of the others lie so far apart each.
  const Feed<T>* row_feeds = axis_feeds(tables, side, level, 0, 0);
  const Feed<T>* column_feeds = axis_feeds(tables, side, level, 1, 0);
  const uint32_t feeds_apart = uint32_t(tables.level[level].feeds);
  const T* pooled = kPooled ? call.pooled + (level * tables.boxes * slabs + slab) * bins * kSlab : nullptr;
  const uint64_t pooled_apart = uint64_t(slabs) * kSlab * uint32_t(bins);
  RAKD_OPAQUE(row_feeds);
  RAKD_OPAQUE(column_feeds);
  RAKD_OPAQUE(pooled);

  for (int64_t begin = 0; begin < tables.boxes; begin += blockDim.x) {
    Meeting own{int32_t(threadIdx.x), 0, 0, 0, 0, 0, 0};
    const int64_t candidate = begin + threadIdx.x;
    const bool meets = candidate < tables.boxes && meet(tables, side, level, candidate, tile, &own);
    int32_t found;
    const int32_t place = rank_in_block(meets, counts, &found);
    if (meets) meetings[place] = own;
    __syncthreads();
    for (int32_t n = 0; n < found; ++n) {
      const Meeting at = meetings[n];
      if (!(at.rows >> warp & 1)) continue;  // the whole warp
      const uint32_t box = uint32_t(begin + at.box);
      const int32_t row = at.row + __popc(at.rows & bits_below(warp));
      const int32_t column = at.column + __popc(at.columns & bits_below(lane));
      const Feed<T> of_row = row_feeds[uint64_t(box) * feeds_apart + row];
      Feed<T> of_column{};
      if (at.columns >> lane & 1) of_column = column_feeds[uint64_t(box) * feeds_apart + column];
      // For further weights than those of the feeds.
      const auto table = [&](int axis) {
        return axis_table(tables, side, level, axis, workspace_room(tables, level, int64_t(box)));
      };
      int32_t done = 0;  // of the lane's bins
      for (int32_t left = at.first_bin; left < at.end_bin; left += kMixBins) {
        const int32_t width_x = at.end_bin - left < kMixBins ? at.end_bin - left : kMixBins;
        if (kPooled) {
          const T* from = pooled + box * pooled_apart + int64_t(of_row.first * bins_x + left) * kSlab;
          static_assert(kSlab == 32, "each lane has a channel");
          T* to = mixed + lane;
          from += lane;
          const int64_t next = int64_t(bins_x) * kSlab;
          if (of_row.count == 1) {
            mix_kept<1>(of_row, from, next, width_x, to);
          } else if (of_row.count == 2) {
            mix_kept<2>(of_row, from, next, width_x, to);
          } else {
            RAKD_ROLLED
            for (int32_t p = 0; p < width_x; ++p) {
              to[p * kMixPitch] = mix(of_row, [&] { return table(0); }, row, from + p * kSlab, next);
            }
          }
        } else {
          const E* gradient = call.output_gradient + (int64_t(box) * call.channels + slab * kSlab) * bins +
                              of_row.first * bins_x + left;
          const T scale = T(tables.scales[level * tables.boxes + box]);
          for (int32_t i = lane; i < width_x * kSlab; i += 32) {
            const int32_t bin = i % width_x, c = i / width_x;
            const E* from = gradient + int64_t(c) * bins + bin;
            const T value = c < channels ? mix(of_row, [&] { return table(0); }, row, from, bins_x) : T(0);
            mixed[bin * kMixPitch + c] = value * scale;
          }
        }
        __syncwarp();
        for (; done < of_column.count && of_column.first + done < left + width_x; ++done) {
          const int32_t p = of_column.first + done;
          static_assert(Feed<T>::kKept == 2, "weights are told apart below");
          const T weight = done == 0 ? of_column.kept[0] : done == 1 ? of_column.kept[1] : table(1).weight(p, column);
          const Quad<T>* from = reinterpret_cast<const Quad<T>*>(mixed + (p - left) * kMixPitch);
          RAKD_UNROLL
          for (int quad = 0; quad < kSlab / 4; ++quad) {
            const Quad<T> values = from[quad];
            RAKD_UNROLL
            for (int c = 0; c < 4; ++c) sum[4 * quad + c] += weight * values.value[c];
          }
        }
        __syncwarp();  // the mixed row is written anew
      }
    }
  }

  if (y >= height || x >= width) return;
  for (int output = 0; output < 2; ++output) {
    const MapView<E>& view = call.gradient[output].level[level];
    if (!view.data || (tables.sides == 2 && output != side)) continue;
    E* out = view.data + tile.image * view.stride[0] + int64_t(slab) * kSlab * view.stride[1] + y * view.stride[2] +
             x * view.stride[3];
    write_channels<kSlab>(sum, output == 0 ? T(1) : T(-1), out, view.stride[1], channels);
  }
}

}  // namespace gpu
}  // namespace rakd
