// The transpose of RoIAlign on the GPU, which gives the gradients of the loss and of pooling:
//
//   gradient[y, x] = sum over boxes of  sum over p of R_x[p, x] (sum over q of R_y[q, y] D[q, p])
//
// D is the pooled difference times twice its scale, or the output's gradient times the scale of the box. A block owns a
// tile of one map's gradient and a block of channels: it gathers from all boxes of its image and writes each element
// once, zeros included. No atomics, and boxes add up in their order.
//
// A warp owns a row of the tile. For each box that meets the tile it forms the inner sum, one row of bins of x, in
// shared memory of its own, from which each lane then takes the bins that feed its cell.
#pragma once

#include "roi_align_forward.cuh"

namespace rakd {
namespace gpu {

constexpr int kBackwardThreads = 256;  // of a block at most; two of them fit a processor's registers, of float64 one
constexpr int kTileColumns = 32;       // a warp's lanes lie side by side in a row of the tile
constexpr int kRowBins = 16;           // bins of x in a warp's row between two barriers
constexpr int kRowBinPitch = kChannelBlock + 4;  // whole Quads, and neighbouring bins hit different banks

template <class T>
struct RoiAlignBackward {
  Tables<T> tables;
  // Out: the gradients of the apprentice's maps and of the expert's, the latter with the opposite sign. Where the two
  // share their tables, one block writes to both.
  Pyramid gradient[2];
  int32_t first_tile[2 * kMaxLevels + 1];  // of side and level: channel block, image, tile; then the end
  const T* pooled;                         // per level [K, channel blocks, bins, kChannelBlock], or nullptr
  const void* output_gradient;             // [K, channels, bins_y, bins_x], of the maps' element type, or nullptr
  SumLosses<T> sum;                        // total != nullptr: one block more adds the losses
};

// A box that puts something into a tile.
struct TileBox {
  int32_t box;
  int32_t row, column;         // first row and column of the support in the tile, by their numbers in the box's tables
  uint32_t rows, columns;      // a bit for each row and column of the tile: whether it is in the support
  int32_t first_bin, end_bin;  // of x: those that feed the tile
};

template <class T>
RAKD_HD size_t backward_shared_bytes(int threads) {
  const size_t warps = size_t(threads) / 32;
  return warps * (kRowBins * kRowBinPitch * sizeof(T) + sizeof(double)) + size_t(threads) * sizeof(TileBox);
}

// Number of the first value that is not less; values never decrease.
RAKD_HD int32_t lower_bound(const int32_t* values, int32_t count, int32_t value) {
  int32_t low = 0;
  for (int32_t high = count; low < high;) {
    const int32_t middle = (low + high) / 2;
    (values[middle] < value ? low : high) = values[middle] < value ? middle + 1 : middle;
  }
  return low;
}

// A tile of one image of one level's map, in cells, and the channel block that is worked on.
struct Tile {
  int32_t image, top, left, rows, columns, channel_block;

  // `number`: among the tiles of a map of height x width cells, by channel block, image, row and column.
  RAKD_HD Tile(int32_t number, int32_t images, int32_t height, int32_t width, int32_t tile_rows, int32_t tile_columns)
      : rows(tile_rows), columns(tile_columns) {
    const int32_t tiles_x = (width + columns - 1) / columns, tiles_y = (height + rows - 1) / rows;
    left = number % tiles_x * columns;
    number /= tiles_x;
    top = number % tiles_y * rows;
    number /= tiles_y;
    image = number % images;
    channel_block = number / images;
  }
};

// The part of the order of boxes that holds those of one image. Numbers outside of the order are possible only in an
// index that a caller of the raw op made, and are cut off.
struct BoxRange {
  int64_t begin, end;
  const int32_t* order;

  template <class T>
  __device__ BoxRange(const Tables<T>& tables, int32_t image) : order(tables.index + tables.images + 1) {
    begin = max(int64_t(tables.index[image]), int64_t(0));
    end = min(int64_t(tables.index[image + 1]), int64_t(tables.boxes));
  }

  // The box at a place of the order; -1 past the end and for no box.
  __device__ int64_t box(int64_t place, int64_t boxes) const {
    const int64_t found = place < end ? order[place] : -1;
    return found < boxes ? found : -1;
  }
};

// Whether the support of a box, as store_extent() left it, may meet the tile. Its values lie `boxes` apart.
RAKD_HD bool extent_meets(const int32_t* extent, int64_t boxes, const Tile& tile) {
  if (extent[0] != tile.image) return false;
  if (extent[boxes] >= tile.top + tile.rows || extent[2 * boxes] < tile.top) return false;
  return extent[3 * boxes] < tile.left + tile.columns && extent[4 * boxes] >= tile.left;
}

// A bit for each cell low .. low + size - 1 that is in the support, of which cells from number `begin` on are looked
// at; size is at most 32.
RAKD_HD uint32_t support_bits(const int32_t* cells, int32_t begin, int32_t count, int32_t low, int32_t size) {
  uint32_t bits = 0;
  for (int32_t t = begin; t < count && cells[t] < low + size; ++t) bits |= uint32_t(1) << (cells[t] - low);
  return bits;
}

RAKD_HD uint32_t bits_below(int32_t place) { return (uint32_t(1) << place) - 1; }

// Whether `box` puts something into the tile, and where to look for it.
template <class T>
__device__ bool find_tile_box(const Tables<T>& tables, int side, int level, int64_t box, const Tile& tile,
                              TileBox* found) {
  if (box < 0) return false;
  const int32_t* extent = tables.extent(side, level, box);
  if (!extent_meets(extent, tables.boxes, tile)) return false;
  const AxisTable<T> y = tables.axis(side, level, 0, box), x = tables.axis(side, level, 1, box);
  found->box = int32_t(box);
  found->row = lower_bound(y.cell, *y.count, tile.top);
  found->rows = support_bits(y.cell, found->row, *y.count, tile.top, tile.rows);
  found->column = lower_bound(x.cell, *x.count, tile.left);
  found->columns = support_bits(x.cell, found->column, *x.count, tile.left, tile.columns);
  if (found->rows == 0 || found->columns == 0) return false;
  const CellBins<T>* columns = tables.columns(side, level, 1, box);
  const CellBins<T>& last = columns[found->column + __popc(found->columns) - 1];
  found->first_bin = columns[found->column].first;
  found->end_bin = last.first + last.count;
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

// Writes sign * sum for the first `channels` of kCount channels of a cell, as elements E.
template <class E, int kCount, class T>
__device__ __forceinline__ void write_channels(const T* sum, T sign, E* out, int64_t stride, int32_t channels) {
  typedef ChannelGroup<E, kCount> Group;
  if (stride == 1 && channels == kCount && reinterpret_cast<uintptr_t>(out) % alignof(Group) == 0) {
    Group group;
    RAKD_UNROLL
    for (int c = 0; c < kCount; ++c) from_accum(sign * sum[c], &group.value[c]);
    *reinterpret_cast<Group*>(out) = group;
    return;
  }
  RAKD_UNROLL
  for (int c = 0; c < kCount; ++c) {
    if (c < channels) from_accum(sign * sum[c], out + c * stride);
  }
}

// Sum over the bins that feed a cell of weight * from[bin * stride]. `table`() gives the rows of R, for a third bin on.
template <class E, class T, class GetTable>
__device__ __forceinline__ T sum_bins(const CellBins<T>& bins, const GetTable& table, int32_t cell, const E* from,
                                      int64_t stride) {
  constexpr int kStored = CellBins<T>::kStored;
  T sum = T(0);
  RAKD_UNROLL
  for (int i = 0; i < kStored; ++i) {
    if (i < bins.count) sum += bins.weight[i] * T(to_accum(from[i * stride]));
  }
  RAKD_ROLLED
  for (int32_t i = kStored; i < bins.count; ++i) {
    sum += table().weight(bins.first + i, cell) * T(to_accum(from[i * stride]));
  }
  return sum;
}

// One channel of a row of `width` bins of x, from kBins bins of y that lie `next` apart. The loads of several bins of x
// are under way together.
template <int kBins, class T>
__device__ __forceinline__ void fill_row(const CellBins<T>& bins, const T* from, int64_t next, int32_t width, T* to) {
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
      for (int b = 0; b < kBins; ++b) value[i][b] = row[b][i * kChannelBlock];
    }
    RAKD_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      if (i >= width) continue;
      T sum = T(0);
      RAKD_UNROLL
      for (int b = 0; b < kBins; ++b) sum += bins.weight[b] * value[i][b];
      to[i * kRowBinPitch] = sum;
    }
    RAKD_UNROLL
    for (int b = 0; b < kBins; ++b) row[b] += kTogether * kChannelBlock;
    to += kTogether * kRowBinPitch;
  }
}

// Block (side, level, channel block, image, tile); blockDim.x is a multiple of 32. E: element type of the output's
// gradient, or void for pooled differences.
template <class T, class E>
__global__ void __launch_bounds__(kBackwardThreads, sizeof(T) == 4 ? 2 : 1)
    roi_align_backward(RoiAlignBackward<T> call) {
  constexpr bool kPooled = std::is_void<E>::value;
  RAKD_SHARED(shared);
  const Tables<T>& tables = call.tables;
  const int32_t bins_y = tables.bins[0], bins_x = tables.bins[1], bins = bins_y * bins_x;
  const int warps = int(blockDim.x) / 32, lane = int(threadIdx.x) % 32;
  // A shuffle tells compilers that the number is the same in all lanes of a warp.
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  T* row_bins = reinterpret_cast<T*>(shared);  // [kRowBins, kRowBinPitch] a warp
  double* sums = reinterpret_cast<double*>(row_bins + warps * kRowBins * kRowBinPitch);
  TileBox* tile_boxes = reinterpret_cast<TileBox*>(sums + warps);
  int32_t* counts = reinterpret_cast<int32_t*>(sums);
  row_bins += warp * kRowBins * kRowBinPitch;

  const int32_t number = int32_t(blockIdx.x);
  if (number == call.first_tile[2 * tables.levels]) {
    add_losses(tables, call.sum, sums);
    return;
  }
  int map = 0;
  while (number >= call.first_tile[map + 1]) ++map;
  const int side = map / tables.levels, level = map % tables.levels;
  const Level& shape = tables.level[level];
  const AxisLayout* axis = shape.axis[side];
  const int32_t height = axis[0].size, width = axis[1].size;
  const Tile tile(number - call.first_tile[map], tables.images, height, width, warps, kTileColumns);
  const int32_t y = tile.top + warp, x = tile.left + lane, first_channel = tile.channel_block * kChannelBlock;
  const int32_t channels = min(shape.channels - first_channel, kChannelBlock);

  T sum[kChannelBlock];
  RAKD_UNROLL
  for (int c = 0; c < kChannelBlock; ++c) sum[c] = T(0);

  // The slice of box 0; that of box k begins k * slice_bytes later.
  const unsigned char* slice = tables.slices + shape.first + axis[0].offset;
  const uint32_t slice_bytes = uint32_t(shape.bytes), x_offset = uint32_t(axis[1].offset - axis[0].offset);
  const T* pooled = nullptr;
  const uint64_t pooled_apart = uint64_t(channel_blocks(shape.channels)) * kChannelBlock * uint32_t(bins);
  RAKD_OPAQUE(slice);
  if constexpr (kPooled) {
    pooled = call.pooled + shape.pooled + int64_t(tile.channel_block) * bins * kChannelBlock;
    RAKD_OPAQUE(pooled);
  }

  const BoxRange range(tables, tile.image);
  for (int64_t begin = range.begin; begin < range.end; begin += blockDim.x) {
    TileBox own{};
    const bool meets = find_tile_box(tables, side, level, range.box(begin + threadIdx.x, tables.boxes), tile, &own);
    int32_t found;
    const int32_t place = rank_in_block(meets, counts, &found);
    if (meets) tile_boxes[place] = own;
    __syncthreads();
    for (int32_t n = 0; n < found; ++n) {
      const TileBox at = tile_boxes[n];
      if (!(at.rows >> warp & 1)) continue;  // the whole warp
      const uint32_t box = uint32_t(at.box);
      const int32_t row = at.row + __popc(at.rows & bits_below(warp));
      const int32_t column = at.column + __popc(at.columns & bits_below(lane));
      const unsigned char* of_box = slice + uint64_t(box) * slice_bytes;
      const CellBins<T> row_cell = reinterpret_cast<const CellBins<T>*>(of_box)[row];
      CellBins<T> column_cell{};
      if (at.columns >> lane & 1) column_cell = reinterpret_cast<const CellBins<T>*>(of_box + x_offset)[column];
      // A cell that feeds more bins than CellBins stores finds their weights in the rows of R.
      const auto table = [&](int axis) { return tables.axis(side, level, axis, int64_t(box)); };
      int32_t done = 0;  // of the lane's bins
      for (int32_t left = at.first_bin; left < at.end_bin; left += kRowBins) {
        const int32_t count = min(at.end_bin - left, kRowBins);
        if constexpr (kPooled) {
          static_assert(kChannelBlock == 32, "each lane has a channel");
          const T* from = pooled + box * pooled_apart + int64_t(row_cell.first * bins_x + left) * kChannelBlock + lane;
          T* to = row_bins + lane;
          const int64_t next = int64_t(bins_x) * kChannelBlock;
          if (row_cell.count == 1) {
            fill_row<1>(row_cell, from, next, count, to);
          } else if (row_cell.count == 2) {
            fill_row<2>(row_cell, from, next, count, to);
          } else {
            RAKD_ROLLED
            for (int32_t p = 0; p < count; ++p) {
              to[p * kRowBinPitch] = sum_bins(row_cell, [&] { return table(0); }, row, from + p * kChannelBlock, next);
            }
          }
        } else {
          const E* gradient = static_cast<const E*>(call.output_gradient) +
                              (int64_t(box) * shape.channels + first_channel) * bins + row_cell.first * bins_x + left;
          const T scale = T(tables.scales[level * tables.boxes + box]);
          for (int32_t i = lane; i < count * kChannelBlock; i += 32) {
            const int32_t bin = i % count, c = i / count;
            const E* from = gradient + int64_t(c) * bins + bin;
            const T value = c < channels ? sum_bins(row_cell, [&] { return table(0); }, row, from, bins_x) : T(0);
            row_bins[bin * kRowBinPitch + c] = value * scale;
          }
        }
        __syncwarp();
        for (; done < column_cell.count && column_cell.first + done < left + count; ++done) {
          const int32_t p = column_cell.first + done;
          static_assert(CellBins<T>::kStored == 2, "weights are told apart below");
          const T weight = done == 0   ? column_cell.weight[0]
                           : done == 1 ? column_cell.weight[1]
                                       : table(1).weight(p, column);
          const Quad<T>* from = reinterpret_cast<const Quad<T>*>(row_bins + (p - left) * kRowBinPitch);
          RAKD_UNROLL
          for (int quad = 0; quad < kChannelBlock / 4; ++quad) {
            const Quad<T> values = from[quad];
            RAKD_UNROLL
            for (int c = 0; c < 4; ++c) sum[4 * quad + c] += weight * values.value[c];
          }
        }
        __syncwarp();  // the row is written anew
      }
    }
  }

  if (y >= height || x >= width) return;
  RAKD_ROLLED
  for (int output = 0; output < 2; ++output) {
    const MapView& view = call.gradient[output].level[level];
    if (!view.data || (shape.sides == 2 && output != side)) continue;
    with_element_type<T>(call.gradient[output].type[level], [&](auto element) {
      auto* out = view.template plane<decltype(element)>(tile.image, first_channel) + uint64_t(y) * view.row_stride +
                  uint64_t(x) * view.column_stride;
      write_channels<decltype(element), kChannelBlock>(sum, output == 0 ? T(1) : T(-1), out, view.channel_stride,
                                                       channels);
    });
  }
}

}  // namespace gpu
}  // namespace rakd
