// What gram_gradient works from on the GPU: differences of both maps, staged or loaded, and pieces of the boxes'
// operators, laid out for a tile in shared memory.
//
// A box adds G_y S G_x to a tile (S = A - E on the box's touched cells, gram_table.h). Its piece holds the bands of G_x
// of the tile's columns, and, for each row that the tile's own rows are coupled with, the weights of G_y that spread it
// over them. Longer bands and more rows come in several parts, one piece after another.
#pragma once

#include "gram_tables.cuh"
#include "spread.cuh"

namespace rakd {
namespace gpu {

constexpr int kGramRows = 8;                    // of a tile, in a thread's registers
constexpr int kGramColumns = 16;                // of a tile, side by side in half a warp
constexpr int kQuad = 4;                        // channels of a thread; half a warp has a quad
constexpr int kPieceCells = 8;                  // a ratio of 2 has bands of at most 7 cells,
constexpr int kPieceRows = 16;                  // and a tile's rows are coupled with at most 14
constexpr int kHaloRows = 3, kHaloColumns = 3;  // around the tile: what is staged where not all that is needed fits
constexpr int kMaxStageColumns = 256;           // as a piece has a byte for each place
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

// A quad of channels of one image of a map. Offsets in a row are of 32 bits (check_strides() of tensors.h).
template <class E>
class QuadPlane {
 public:
  typedef typename Accumulator<E>::type T;

  __device__ QuadPlane(const MapView<const E>& map, int32_t image, int32_t channel, int32_t channels)
      : first_(map.data + image * map.stride[0] + channel * map.stride[1]),
        channel_stride_(map.stride[1]),
        row_stride_(uint32_t(map.stride[2])),
        stride_(uint32_t(map.stride[3])),
        channels_(channels - channel < kQuad ? channels - channel : kQuad) {
    constexpr uint32_t kWord = alignof(Together) / sizeof(E);
    together_ = channel_stride_ == 1 && channels_ == kQuad && row_stride_ % kWord == 0 && stride_ % kWord == 0 &&
                reinterpret_cast<uintptr_t>(first_) % alignof(Together) == 0;
    RAKD_OPAQUE(first_);
  }

  // At a cell; zero for channels past the last.
  __device__ __forceinline__ Quad<T> operator()(int32_t y, int32_t x) const {
    const E* from = first_ + uint64_t(uint32_t(y)) * row_stride_ + uint32_t(x) * stride_;
    Quad<T> values;
    if (together_) {
      const Together together = *reinterpret_cast<const Together*>(from);
      RAKD_UNROLL
      for (int c = 0; c < kQuad; ++c) values.value[c] = widen(together.value[c]);
    } else {
      RAKD_UNROLL
      for (int c = 0; c < kQuad; ++c) values.value[c] = c < channels_ ? widen(from[c * channel_stride_]) : T(0);
    }
    return values;
  }

 private:
  typedef Channels<E, kQuad> Together;

  const E* first_;
  int64_t channel_stride_;
  uint32_t row_stride_, stride_;
  int32_t channels_;
  bool together_;  // whether each quad is a whole word
};

// A - E of a quad of channels of one image and level.
template <class E>
class Difference {
 public:
  typedef typename Accumulator<E>::type T;

  __device__ Difference(const MapView<const E>& a, const MapView<const E>& e, int32_t image, int32_t channel,
                        int32_t channels)
      : a_(a, image, channel, channels), e_(e, image, channel, channels) {}

  __device__ __forceinline__ Quad<T> operator()(int32_t y, int32_t x) const {
    Quad<T> value = a_(y, x);
    const Quad<T> other = e_(y, x);
    RAKD_UNROLL
    for (int c = 0; c < kQuad; ++c) value.value[c] -= other.value[c];
    return value;
  }

 private:
  QuadPlane<E> a_, e_;
};

// Differences in shared memory: [rows, columns, quads] of Quads. Quads of neighbouring columns are mixed such that
// lanes side by side meet different banks.
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
struct alignas(16) Piece {
  T weight_y[kPieceRows][kGramRows];               // times twice the scale; zero where rows are not coupled
  T weight_x[kPieceCells][kGramColumns];           // the bands of the tile's columns
  int32_t row[kPieceRows];                         // positions
  int32_t first[kGramColumns];                     // of each column's band, by its number among the touched ones
  unsigned char place[kPieceCells][kGramColumns];  // from the left of what is staged
  unsigned char length[kGramColumns];              // cells; 0 for columns that the box does not touch
  int32_t rows, widest;                            // rows, and cells of the widest band
  int32_t parts;                                   // of the box on this tile
  int32_t staged;                                  // whether the stage holds all that the box needs
  int32_t box;
};

// A box that puts something into the tile: its touched cells there.
struct GramMeeting {
  int32_t box;  // from the first candidate
  CellRange rows, columns;
};

// The touched cells from position `low` to before `low + size`. Between the cells that a large box touches there may be
// tiles without any.
RAKD_HD CellRange cells_between(const int32_t* cells, int32_t count, int32_t low, int32_t size) {
  const int32_t begin = lower_bound(cells, 0, count, low), most = begin + size < count ? begin + size : count;
  return CellRange{begin, lower_bound(cells, begin, most, low + size)};
}

// Whether `box` puts something into the tile, where, and which cells of the maps that needs.
template <class T>
__device__ bool meet(const GramTables<T>& tables, int level, int64_t box, const Tile& tile, GramMeeting* found,
                     Rectangle* needed) {
  if (!extent_meets(tables.extents + int64_t(level) * kExtent * tables.boxes + box, tables.boxes, tile)) return false;
  const Bands<T> y = bands_of(tables, level, 0, box), x = bands_of(tables, level, 1, box);
  found->rows = cells_between(y.cell, *y.count, tile.top, tile.rows);
  found->columns = cells_between(x.cell, *x.count, tile.left, tile.columns);
  if (found->rows.begin == found->rows.end || found->columns.begin == found->columns.end) return false;
  const CellRange rows = y.coupled(found->rows), columns = x.coupled(found->columns);
  *needed = Rectangle{y.cell[rows.begin], x.cell[columns.begin], y.cell[rows.end - 1] + 1, x.cell[columns.end - 1] + 1};
  return true;
}

// By a whole warp: part `part` of what `box` does to the tile. A part past the last has no rows.
template <class T>
__device__ void make_piece(const GramTables<T>& tables, int level, const Tile& tile, int64_t box, const GramMeeting& at,
                           int32_t part, const Rectangle& held, Piece<T>* piece) {
  const int32_t lane = int32_t(threadIdx.x) % 32;
  const Bands<T> y = bands_of(tables, level, 0, box), x = bands_of(tables, level, 1, box);
  const CellRange rows = y.coupled(at.rows), columns = x.coupled(at.columns);
  const Rectangle needed{y.cell[rows.begin], x.cell[columns.begin], y.cell[rows.end - 1] + 1,
                         x.cell[columns.end - 1] + 1};
  const int32_t t = at.columns.begin + lane;
  const CellRange band = t < at.columns.end ? CellRange{x.begin[t], x.end[t]} : CellRange{0, 0};
  int32_t widest = band.end - band.begin;
  for (int step = 16; step > 0; step /= 2) {
    const int32_t other = __shfl_xor_sync(0xffffffffu, widest, step);
    widest = other > widest ? other : widest;
  }
  const int32_t cell_parts = (widest + kPieceCells - 1) / kPieceCells;
  const int32_t row_parts = (rows.end - rows.begin + kPieceRows - 1) / kPieceRows;
  const int32_t skipped = part % cell_parts * kPieceCells, first_row = rows.begin + part / cell_parts * kPieceRows;
  const int32_t left_rows = rows.end - first_row, row_count = left_rows < kPieceRows ? left_rows : kPieceRows;
  const bool staged = held.holds(needed);
  if (lane == 0) {
    piece->rows = part < cell_parts * row_parts ? row_count : 0;
    piece->widest = widest - skipped < kPieceCells ? widest - skipped : kPieceCells;
    piece->parts = cell_parts * row_parts;
    piece->staged = staged ? 1 : 0;
    piece->box = int32_t(box);
  }
  if (part >= cell_parts * row_parts) return;

  if (lane < kGramColumns) piece->length[lane] = 0;
  for (int32_t i = lane; i < row_count * kGramRows; i += 32) piece->weight_y[i / kGramRows][i % kGramRows] = T(0);
  __syncwarp();
  if (t < at.columns.end) {
    const int32_t left = band.end - band.begin - skipped, column = x.cell[t] - tile.left;
    const int32_t length = left < 0 ? 0 : left < kPieceCells ? left : kPieceCells;
    piece->length[column] = static_cast<unsigned char>(length);
    piece->first[column] = band.begin + skipped;
    for (int32_t s = 0; s < length; ++s) {
      piece->weight_x[s][column] = x.value[int64_t(t) * x.pitch + skipped + s];
      if (staged) {
        piece->place[s][column] = static_cast<unsigned char>(x.cell[band.begin + skipped + s] - held.left);
      }
    }
  }
  if (lane < row_count) piece->row[lane] = y.cell[first_row + lane];
  const double factor = 2.0 * tables.scales[level * tables.boxes + box];
  for (int32_t i = lane; i < (at.rows.end - at.rows.begin) * row_count; i += 32) {
    const int32_t own = at.rows.begin + i / row_count, from = first_row + i % row_count;
    if (from < y.begin[own] || from >= y.end[own]) continue;
    const double value = double(y.value[int64_t(own) * y.pitch + from - y.begin[own]]);
    piece->weight_y[i % row_count][y.cell[own] - tile.top] = T(factor * value);
  }
}

}  // namespace gpu
}  // namespace rakd
