// Plan of the boxes of one image on one level: the cells they touch and with which weights, laid out in scratch. Made
// once per call and shared by all channels; nothing here depends on the maps' values.
//
//   box --axis_table.h--> R_y [bins_y, rows], R_x [bins_x, columns], sparse      one Patch
//   all boxes ----------> union of the boxes' supports on the map                Segments, by row
//   segments -----------> scratch [cell][W channels], with gaps between them     Plan
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../axis_table.h"
#include "cached_memory.h"
#include "gram_operator.h"

namespace rakd {

// The boxes of a call, as the op prepare_boxes made them.
struct BoxRows {
  const double* rows;    // [count, 5 + levels] image, x1, y1, x2, y2, weights of the levels
  const int32_t* begin;  // [images + 1] of each image's boxes in `order`
  const int32_t* order;  // [count] box numbers by image
  int64_t count, images, levels;

  const double* row(int64_t k) const { return rows + k * (5 + levels); }
};

// RoIAlign along one axis is a matrix R (bins x cells). Its columns are the cells that some sample touches, so that a
// large box costs as much as its samples and not as its area.
template <class T>
struct Axis {
  int32_t count = 0, bins = 0;      // support cells; rows of R
  const int32_t* cell = nullptr;    // [count] their positions on the map, increasing
  const int32_t* begin = nullptr;   // [bins] first support cell of each bin; the others follow
  const int32_t* offset = nullptr;  // [bins + 1] into weight
  const int32_t* fresh = nullptr;   // [bins] first support cell that no earlier bin touches
  const T* weight = nullptr;        // [offset[bins]] R, bin by bin
};

// One box on one map.
template <class T>
struct Patch {
  int64_t box;     // its row
  double scale;    // weight of this patch in the result
  bool assembled;  // part of the plan's Gram operator
  Axis<T> y, x;
  const int64_t* row_base;       // [y.count] scratch cell of (y.cell[i], x.cell[t]) = row_base[i] + x.cell[t]
  const int64_t* gradient_base;  // [y.count] the same in compact scratch for gradients; not for assembled patches
};

// A run of support cells of one map row; they lie at scratch cells offset .. offset + end - begin. Compact scratch for
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
      size_ = std::max(bytes, kMinChunk << std::min<size_t>(2 * chunks_.size(), 6));
      chunks_.emplace_back(size_);
      used_ = 0;
    }
    U* result = reinterpret_cast<U*>(chunks_.back().data() + used_);
    used_ += bytes;
    return result;
  }
  template <class U, class V>
  U* copy(const V* values, int64_t count) {
    U* stored = take<U>(count);
    std::copy_n(values, count, stored);
    return stored;
  }

 private:
  static constexpr size_t kMinChunk = size_t(1) << 13;
  std::vector<Buffer> chunks_;
  size_t size_ = 0, used_ = 0;
};

template <class T>
struct Plan {
  const Patch<T>* patches = nullptr;  // [patch_count] in the order of the boxes
  int64_t patch_count = 0;
  Segment* segments = nullptr;  // [segment_count] by row, then column; all cells that any patch touches
  int64_t segment_count = 0;
  int64_t cells = 0;              // cells in all segments, and gaps
  int64_t gradient_cells = 0;     // of compact scratch for gradients
  int64_t height = 0, width = 0;  // of the map
  int64_t rows = 0;               // most support rows of a patch
  GramOperator<T> gram;
  Arena arena;
};

struct PlanLevel {
  double stride;  // pixels per cell
  int64_t height, width;
  double factor = 1.0;         // of all weights of the level
  int64_t channel_blocks = 0;  // that may share a Gram operator; 0: none is wanted
};

// Options that all plans of a call share.
struct PlanOptions {
  int64_t bins_y, bins_x, sampling_ratio;
  const double* box_factor = nullptr;  // [boxes] of their weights; nullptr: 1
  bool gradients = true;               // wanted of the Gram operator; else the loss alone

  int64_t bins() const { return bins_y * bins_x; }
};

// [levels * images]. A box whose weight is zero on a level has no patch there.
template <class T>
std::vector<Plan<T>> build_plans(const BoxRows& boxes, const PlanOptions& options,
                                 const std::vector<PlanLevel>& levels);

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

}  // namespace rakd
