// Gradients on the GPU. A block owns a tile of one map's gradient and one slab of channels: it gathers what all boxes
// put there and writes each element once, zeros included. No atomics, and boxes add up in their order.
//
// A warp owns a row of the tile. For each box that meets the tile it mixes the bins of y that feed its row into one row
// of bins of x, in shared memory of its own, from which each lane then takes the bins that feed its cell.
#pragma once

#include "pool.cuh"

namespace rakd {
namespace gpu {

constexpr int kTileColumns = 32;      // a warp's lanes lie side by side in a row of the tile
constexpr int kMixBins = 16;          // bins of x that a warp mixes at a time
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

// Number of `cell` among the touched ones low .. high - 1, or -1.
RAKD_HD int32_t find_cell(const int32_t* cells, int32_t low, int32_t high, int32_t cell) {
  const int32_t found = lower_bound(cells, low, high, cell);
  return found < high && cells[found] == cell ? found : -1;
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

// The touched cells from position `low` to before `low + size`. Between the cells that a large box touches there may be
// tiles without any.
RAKD_HD CellRange cells_between(const int32_t* cells, int32_t count, int32_t low, int32_t size) {
  const int32_t begin = lower_bound(cells, 0, count, low), most = begin + size < count ? begin + size : count;
  return CellRange{begin, lower_bound(cells, begin, most, low + size)};
}

// Whether `box` puts something into the tile, and where to look for it.
template <class T>
__device__ bool meet(const Tables<T>& tables, int side, int level, int64_t box, const Tile& tile, Meeting* found) {
  const int32_t* extent = tables.extents + int64_t(side * tables.levels + level) * kExtent * tables.boxes + box;
  if (!extent_meets(extent, tables.boxes, tile)) return false;
  const Room<T> room = workspace_room(tables, level, box);
  const AxisTable<T> y = axis_table(tables, side, level, 0, room), x = axis_table(tables, side, level, 1, room);
  const CellRange rows = cells_between(y.cell, *y.count, tile.top, tile.rows);
  const CellRange columns = cells_between(x.cell, *x.count, tile.left, tile.columns);
  if (rows.begin == rows.end || columns.begin == columns.end) return false;
  found->row = rows.begin;
  found->column = columns.begin;
  found->first_bin = x.cell_bin[columns.begin];
  found->end_bin = lower_bound(x.bin_cell, found->first_bin, tables.bins[1], columns.end);
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

// Block (tile of all sides, levels and images, slab); blockDim.x is a multiple of 32.
template <class E>
__global__ void spread(Spread<E> call) {
  typedef typename Accumulator<E>::type T;
  RAKD_SHARED(shared);
  const Tables<T>& tables = call.tables;
  const int32_t bins_y = tables.bins[0], bins_x = tables.bins[1], bins = bins_y * bins_x;
  const int warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
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

  for (int64_t begin = 0; begin < tables.boxes; begin += blockDim.x) {
    Meeting own{int32_t(threadIdx.x), 0, 0, 0, 0};
    const int64_t candidate = begin + threadIdx.x;
    const bool meets = candidate < tables.boxes && meet(tables, side, level, candidate, tile, &own);
    int32_t found;
    const int32_t place = rank_in_block(meets, counts, &found);
    if (meets) meetings[place] = own;
    __syncthreads();
    for (int32_t n = 0; n < found; ++n) {
      const Meeting at = meetings[n];
      const int64_t box = begin + at.box;
      const Room<T> room = workspace_room(tables, level, box);
      const AxisTable<T> ay = axis_table(tables, side, level, 0, room), ax = axis_table(tables, side, level, 1, room);
      // A tile's row number r is at most the r-th touched one from the first.
      const int32_t rows = at.row + warp + 1 < *ay.count ? at.row + warp + 1 : *ay.count;
      const int32_t ty = find_cell(ay.cell, at.row, rows, y);
      if (ty < 0) continue;  // the whole warp
      const int32_t columns = at.column + lane + 1 < *ax.count ? at.column + lane + 1 : *ax.count;
      const int32_t tx = find_cell(ax.cell, at.column, columns, x), first_q = ay.cell_bin[ty];
      int32_t p = tx < 0 ? bins_x : ax.cell_bin[tx];  // the lane's next bin
      const int64_t entry = (level * tables.boxes + box) * slabs + slab;
      const T* pooled = call.pooled ? call.pooled + entry * bins * kSlab : nullptr;
      const E* gradient = pooled ? nullptr : call.output_gradient + (box * call.channels + slab * kSlab) * bins;
      for (int32_t left = at.first_bin; left < at.end_bin; left += kMixBins) {
        const int32_t width_x = at.end_bin - left < kMixBins ? at.end_bin - left : kMixBins;
        for (int32_t i = lane; i < width_x * kSlab; i += 32) {
          // Neighbouring lanes read neighbouring addresses of either.
          const int32_t bin = pooled ? i / kSlab : i % width_x, c = pooled ? i % kSlab : i / width_x;
          T value = T(0);
          for (int32_t q = first_q; q < bins_y && ay.bin_cell[q] <= ty; ++q) {
            const int64_t from = int64_t(q) * bins_x + left + bin;
            if (pooled) {
              value += ay.weight(q, ty) * pooled[from * kSlab + c];
            } else if (c < channels) {
              value += ay.weight(q, ty) * widen(gradient[int64_t(c) * bins + from]);
            }
          }
          if (!pooled) value *= T(tables.scales[level * tables.boxes + box]);
          mixed[bin * kMixPitch + c] = value;
        }
        __syncwarp();
        for (; p < left + width_x && ax.bin_cell[p] <= tx; ++p) {
          const T weight = ax.weight(p, tx);
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
