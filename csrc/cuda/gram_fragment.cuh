// Inputs of gram_gradient on the GPU: differences of both maps, staged or loaded, and fragments of the boxes'
// operators, laid out for a tile in shared memory.
//
// A box adds G_y S G_x to a tile (S = A - E on the support of the box, ../gram_table.h). Its fragment holds the bands
// of G_x of the tile's columns, and, for each row that the tile's own rows are coupled with, the weights of G_y that
// spread it over them. Longer bands and more rows come in several parts, one fragment after another.
#pragma once

#include "roi_align_backward.cuh"

namespace rakd {
namespace gpu {

constexpr int kGramRows = 8;                    // of a tile, in a thread's registers
constexpr int kGramColumns = 16;                // of a tile, side by side in half a warp
constexpr int kQuad = 4;                        // channels of a thread; half a warp has a quad
constexpr int kFragmentCells = 8;               // a ratio of 2 has bands of at most 7 cells,
constexpr int kFragmentRows = 16;               // and a tile's rows are coupled with at most 14
constexpr int kHaloRows = 3, kHaloColumns = 3;  // around the tile: staged where not all cells that boxes need fit
constexpr int kMaxStageColumns = 256;           // as a fragment has a byte for each place
constexpr int kMaxStageCells = 1024;            // see fill_stage()

// Cells top .. bottom - 1, left .. right - 1 of a map.
struct Rectangle {
  int32_t top, left, bottom, right;

  RAKD_HD int32_t rows() const { return bottom > top ? bottom - top : 0; }
  RAKD_HD int32_t columns() const { return right > left ? right - left : 0; }
  RAKD_HD bool holds(int32_t y, int32_t x) const { return y >= top && y < bottom && x >= left && x < right; }
  RAKD_HD bool holds(const Rectangle& other) const {
    return other.top >= top && other.bottom <= bottom && other.left >= left && other.right <= right;
  }
};

// A - E of a quad of channels of one image and level, both of element type E.
template <class E>
class Difference {
 public:
  typedef decltype(to_accum(E())) T;

  __device__ Difference(const Pyramid (&map)[2], int level, int32_t image, int32_t channel, int32_t channels)
      : channels_(min(channels - channel, kQuad)) {
    constexpr uint32_t kWord = alignof(Group) / sizeof(E);
    for (int i = 0; i < 2; ++i) {
      const MapView& view = map[i].level[level];
      plane_[i] = view.plane<const E>(image, channel);
      channel_stride_[i] = view.channel_stride;
      row_stride_[i] = view.row_stride;
      column_stride_[i] = view.column_stride;
      grouped_[i] = channel_stride_[i] == 1 && channels_ == kQuad && row_stride_[i] % kWord == 0 &&
                    column_stride_[i] % kWord == 0 && reinterpret_cast<uintptr_t>(plane_[i]) % alignof(Group) == 0;
      RAKD_OPAQUE(plane_[i]);
    }
  }

  // At a cell; zero for channels past the last.
  __device__ __forceinline__ Quad<T> operator()(int32_t y, int32_t x) const {
    Quad<T> value = load(0, y, x);
    const Quad<T> other = load(1, y, x);
    RAKD_UNROLL
    for (int c = 0; c < kQuad; ++c) value.value[c] -= other.value[c];
    return value;
  }

 private:
  typedef ChannelGroup<E, kQuad> Group;

  __device__ __forceinline__ Quad<T> load(int i, int32_t y, int32_t x) const {
    const E* from = plane_[i] + uint64_t(uint32_t(y)) * row_stride_[i] + uint32_t(x) * column_stride_[i];
    Quad<T> values;
    if (grouped_[i]) {
      const Group group = *reinterpret_cast<const Group*>(from);
      RAKD_UNROLL
      for (int c = 0; c < kQuad; ++c) values.value[c] = to_accum(group.value[c]);
    } else {
      RAKD_UNROLL
      for (int c = 0; c < kQuad; ++c) values.value[c] = c < channels_ ? to_accum(from[c * channel_stride_[i]]) : T(0);
    }
    return values;
  }

  const E* plane_[2];
  int64_t channel_stride_[2];
  uint32_t row_stride_[2], column_stride_[2];
  int32_t channels_;
  bool grouped_[2];  // whether each quad is a whole word
};

// Differences in shared memory: [rows, columns, quads] of Quads. Quads of neighbouring columns are permuted such that
// neighbouring lanes hit different banks.
template <class T>
struct Stage {
  Quad<T>* data;
  Rectangle held;

  RAKD_HD int32_t place(int32_t column, int32_t quad, int32_t quads) const {
    return column * quads + (quad ^ (column * quads / 8 & (quads - 1)));
  }
  RAKD_HD int32_t row(int32_t y, int32_t quads) const { return (y - held.top) * held.columns() * quads; }
};

template <class T>
struct alignas(16) Fragment {
  T weight_y[kFragmentRows][kGramRows];               // times twice the scale; zero where rows are not coupled
  T weight_x[kFragmentCells][kGramColumns];           // the bands of the tile's columns
  int32_t row[kFragmentRows];                         // positions
  int32_t first[kGramColumns];                        // of each column's band, by its number in the support
  unsigned char place[kFragmentCells][kGramColumns];  // from the left of what is staged
  unsigned char length[kGramColumns];                 // cells; 0 for columns that the box does not touch
  int32_t rows, widest;                               // rows, and cells of the widest band
  int32_t parts;                                      // of the box on this tile
  int32_t staged;                                     // whether the stage holds all that the box needs
  int32_t box;
};

// The cells of the maps that a box on a tile needs.
template <class T>
__device__ Rectangle cells_needed(const Bands<T>& y, const Bands<T>& x, const TileBox& at) {
  const CellRange rows = y.coupled(at.row_range()), columns = x.coupled(at.column_range());
  return Rectangle{y.cell[rows.begin], x.cell[columns.begin], y.cell[rows.end - 1] + 1, x.cell[columns.end - 1] + 1};
}

// By a whole warp: part `part` of the operator of the box on the tile. A part past the last has no rows.
template <class T>
__device__ void make_fragment(const Tables<T>& tables, int level, const Tile& tile, const TileBox& at, int32_t part,
                              const Rectangle& held, Fragment<T>* fragment) {
  const int32_t lane = int32_t(threadIdx.x) % 32;
  const Bands<T> y = tables.bands(level, 0, at.box), x = tables.bands(level, 1, at.box);
  const CellRange own_rows = at.row_range(), own_columns = at.column_range(), rows = y.coupled(own_rows);
  const int32_t t = own_columns.begin + lane;
  const CellRange band = t < own_columns.end ? CellRange{x.begin[t], x.end[t]} : CellRange{0, 0};
  int32_t widest = band.end - band.begin;
  for (int step = 16; step > 0; step /= 2) widest = max(widest, __shfl_xor_sync(0xffffffffu, widest, step));
  const int32_t cell_parts = (widest + kFragmentCells - 1) / kFragmentCells;
  const int32_t row_parts = (rows.end - rows.begin + kFragmentRows - 1) / kFragmentRows;
  const int32_t skipped = part % cell_parts * kFragmentCells,
                first_row = rows.begin + part / cell_parts * kFragmentRows;
  const int32_t row_count = min(rows.end - first_row, kFragmentRows);
  const bool staged = held.holds(cells_needed(y, x, at));
  if (lane == 0) {
    fragment->rows = part < cell_parts * row_parts ? row_count : 0;
    fragment->widest = min(widest - skipped, kFragmentCells);
    fragment->parts = cell_parts * row_parts;
    fragment->staged = staged ? 1 : 0;
    fragment->box = at.box;
  }
  if (part >= cell_parts * row_parts) return;

  if (lane < kGramColumns) fragment->length[lane] = 0;
  for (int32_t i = lane; i < row_count * kGramRows; i += 32) fragment->weight_y[i / kGramRows][i % kGramRows] = T(0);
  __syncwarp();
  if (t < own_columns.end) {
    const int32_t column = x.cell[t] - tile.left;
    const int32_t length = max(min(band.end - band.begin - skipped, kFragmentCells), 0);
    fragment->length[column] = static_cast<unsigned char>(length);
    fragment->first[column] = band.begin + skipped;
    for (int32_t s = 0; s < length; ++s) {
      fragment->weight_x[s][column] = x.value[int64_t(t) * x.pitch + skipped + s];
      if (staged) {
        fragment->place[s][column] = static_cast<unsigned char>(x.cell[band.begin + skipped + s] - held.left);
      }
    }
  }
  if (lane < row_count) fragment->row[lane] = y.cell[first_row + lane];
  const double factor = 2.0 * tables.scales[level * tables.boxes + at.box];
  for (int32_t i = lane; i < (own_rows.end - own_rows.begin) * row_count; i += 32) {
    const int32_t own = own_rows.begin + i / row_count, from = first_row + i % row_count;
    if (from < y.begin[own] || from >= y.end[own]) continue;
    const double value = double(y.value[int64_t(own) * y.pitch + from - y.begin[own]]);
    fragment->weight_y[i % row_count][y.cell[own] - tile.top] = T(factor * value);
  }
}

}  // namespace gpu
}  // namespace rakd
