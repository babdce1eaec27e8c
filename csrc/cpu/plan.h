// What the CPU kernels need to know about the boxes of one image on one map: which cells they touch and with
// which weights. Made once per call, shared by all channels; nothing here depends on the maps' values.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../axis_table.h"
#include "kept_memory.h"

namespace rakd {

// RoIAlign along one axis is a matrix R (bins x cells). Columns count only the cells that some sample touches,
// so a large box costs what its samples cost and not what it covers.
template <class T>
struct Axis {
  int32_t count = 0, bins = 0;      // touched cells; rows of R
  const int32_t* cell = nullptr;    // their positions on the map, increasing
  const int32_t* begin = nullptr;   // [bins] first touched cell of each bin; the others follow
  const int32_t* offset = nullptr;  // [bins + 1] into weight
  const int32_t* fresh = nullptr;   // [bins] first touched cell that no earlier bin touches
  const T* weight = nullptr;        // R, bin by bin
};

// One box on one map.
template <class T>
struct Patch {
  int64_t box;     // row of the boxes tensor
  double scale;    // coefficient of this patch in the result
  bool assembled;  // part of the plan's Gram operator
  Axis<T> y, x;
  const int64_t* row_base;  // scratch pixel of (y.cell[i], x.cell[t]) = row_base[i] + x.cell[t]
  // The same in compact scratch for gradients; not for assembled patches.
  const int64_t* gradient_base;
};

// Scratch pixels that belong to no cell, between segments and before the first: zero, so that windows of cells may
// reach over a segment's ends.
constexpr int64_t kGap = 4;

// A run of touched cells of one map row; they lie at scratch pixels offset .. offset + end - begin. Compact scratch for
// gradients has only the segments that patches outside the operator touch, from `gradient` on; -1: none of them does.
struct Segment {
  int64_t row, begin, end, offset, gradient;
};

// Bump allocator: pointers stay valid while it lives, thousands of small tables cost a few allocations.
class Arena {
 public:
  template <class U>
  U* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(U) + 15) & ~size_t(15);
    if (chunks_.empty() || used_ + bytes > size_) {
      size_ = bytes > kChunk ? bytes : kChunk;
      chunks_.emplace_back(size_);
      used_ = 0;
    }
    U* result = reinterpret_cast<U*>(chunks_.back().data() + used_);
    used_ += bytes;
    return result;
  }
  template <class U, class V>
  const U* copy(const V* values, int64_t count) {
    U* stored = take<U>(count);
    std::copy_n(values, count, stored);
    return stored;
  }

 private:
  static constexpr size_t kChunk = size_t(1) << 18;
  std::vector<Buffer> chunks_;
  size_t size_ = 0, used_ = 0;
};

// One row of the windows of a run's cells: it couples cell u with the cells up to `radius` columns left and right of
// scratch pixel u + shift.
struct GramRow {
  int64_t shift, weight;  // its weights begin at gram.weight[weight + u * kHalf], see GramOperator
  int32_t radius;
};

// Neighbouring cells whose windows have the same rows.
struct GramRun {
  int64_t first, count;  // scratch pixels
  int64_t cell;          // of the first on the map, row by row
  int64_t gradient;      // of the first in compact scratch for gradients, or -1
  int32_t row_begin, row_end;
};

// Σ_k 2 scale_k (R_y,k^T R_y,k) ⊗ (R_x,k^T R_x,k) over the assembled patches: a sparse matrix from cells to cells that
// all channels share. A cell is coupled with those at most kRadius rows and columns away. Both factors being symmetric,
// a quarter of it is kept: what couples scratch pixel v with those 0 to kRadius columns right of it, in its own row and
// in each of the radius_y below.
template <class T>
struct GramOperator {
  static constexpr int kRadius = 4, kHalf = kRadius + 1;
  static_assert(kRadius <= kGap, "windows reach over a segment's ends into the gap");
  T* weight = nullptr;  // [radius_y + 1][pixels and gaps][kHalf]; nullptr: no patch is assembled
  int64_t plane = 0;    // values from one row below to the next
  int radius_y = 0;
  const GramRun* runs = nullptr;  // all cells of all segments
  int64_t run_count = 0;
  const GramRow* rows = nullptr;
};

template <class T>
struct Plan {
  const Patch<T>* patches = nullptr;  // in the order of the boxes
  int64_t patch_count = 0;
  Segment* segments = nullptr;  // by row, then column; all cells that any patch touches
  int64_t segment_count = 0;
  int64_t pixels = 0;             // cells in all segments, and gaps
  int64_t gradient_pixels = 0;    // of compact scratch for gradients
  int64_t height = 0, width = 0;  // of the map
  int64_t rows = 0;               // most touched rows of a patch
  GramOperator<T> gram;
  Arena arena;
};

struct PlanRequest {
  const double* boxes = nullptr;         // [*, 5]: batch index, x1, y1, x2, y2
  const std::vector<int64_t>* selected;  // rows of `boxes` that lie in this image
  const double* scales = nullptr;        // per row of `boxes`; a zero drops the box
  int64_t scale_stride = 1;
  double stride = 1.0;  // pixels per cell
  int64_t height = 0, width = 0;
  int64_t bins_y = 0, bins_x = 0;
  int64_t sampling_ratio = 0;
  int64_t channel_blocks = 0;  // that share a Gram operator; 0: none is wanted
  bool gradients = true;       // wanted of the operator; else the loss alone
};

template <class T>
Plan<T> build_plan(const PlanRequest& request);

// The segments of each map row, among the rows from the first to the last that have any.
class SegmentsOfRows {
 public:
  SegmentsOfRows(const Segment* segments, int64_t count) : top_(segments[0].row), bottom_(segments[count - 1].row) {
    begin_.assign(bottom_ - top_ + 2, 0);
    for (int64_t n = 0; n < count; ++n) ++begin_[segments[n].row - top_ + 1];
    for (size_t y = 1; y < begin_.size(); ++y) begin_[y] += begin_[y - 1];
  }
  int64_t begin(int64_t row) const { return begin_[std::max(row, top_) - top_]; }
  int64_t end(int64_t row) const { return begin_[std::min(row, bottom_) - top_ + 1]; }

 private:
  int64_t top_, bottom_;
  std::vector<int64_t> begin_;
};

// Marks the patches that are cheaper so as assembled; false if none is.
template <class T>
bool choose_assembled(Plan<T>& plan, Patch<T>* patches, int64_t channel_blocks, bool gradients);

// Assembles them into the plan's Gram operator.
template <class T>
void assemble_operator(Plan<T>& plan, const Patch<T>* patches);

}  // namespace rakd
