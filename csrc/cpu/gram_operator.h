// The Gram operator of one image and level, G = Σ_k 2 scale_k (R_y,k^T R_y,k) ⊗ (R_x,k^T R_x,k): the gradient of the
// loss is G (A - E) and the loss half their inner product. It is assembled once for all channels; applying it costs the
// same however many boxes lie on the same cells.
#pragma once

#include <cstdint>

namespace rakd {

template <class T>
struct Patch;
template <class T>
struct Plan;

// Scratch cells that are no cell of the map, between segments and before the first: zero, so that windows of cells may
// reach over a segment's ends.
constexpr int64_t kGap = 4;

// One row of the windows of a run's cells: it couples cell u with the cells up to `radius` columns left and right of
// scratch cell u + shift.
struct GramRow {
  int64_t shift, weight;  // its weights begin at gram.weight[weight + u * kHalf], see GramOperator
  int32_t radius;
};

// Neighbouring cells whose windows have the same rows.
struct GramRun {
  int64_t first, count;  // scratch cells
  int64_t cell;          // of the first on the map, row by row
  int64_t gradient;      // of the first in compact scratch for gradients, or -1
  int32_t row_begin, row_end;
};

// A sparse matrix from cells to cells: a cell is coupled with those at most kRadius rows and columns away. Both factors
// being symmetric, a quarter of it is stored: the coupling of scratch cell v with those 0 to kRadius columns right of
// it, in its own row and in each of the radius_y rows below.
template <class T>
struct GramOperator {
  static constexpr int kRadius = 4, kHalf = kRadius + 1;
  static_assert(kRadius <= kGap, "windows reach over a segment's ends into the gap");
  T* weight = nullptr;  // [radius_y + 1][cells and gaps][kHalf]; nullptr: no patch is assembled
  int64_t plane = 0;    // values from one row below to the next
  int radius_y = 0;
  const GramRun* runs = nullptr;  // [run_count] all cells of all segments
  int64_t run_count = 0;
  const GramRow* rows = nullptr;  // of all runs
};

// Marks those patches as assembled for which the operator is cheaper than their own passes; false if there are none.
// `gradients`: they are wanted, not the loss alone. `channel_blocks` share the operator.
template <class T>
bool choose_algorithm(Plan<T>& plan, Patch<T>* patches, int64_t channel_blocks, bool gradients);

// Assembles the marked patches [plan.patch_count] into the plan's operator.
template <class T>
void assemble_operator(Plan<T>& plan, const Patch<T>* patches);

}  // namespace rakd
