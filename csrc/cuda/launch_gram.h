// Host side of the loss and its gradient: the choice between the pooled form and the Gram form, workspace and launches.
// Free of torch, as launch.h.
#pragma once

#include "launch.h"

namespace rakd {
namespace gpu {

// The caller's wish for the form of a training step.
enum class Algorithm { kByShape, kPooled, kGram };

// Cells of a tile with its rim; more are not worth the memory.
constexpr int32_t kStageCells = (kGramRows + 2 * kHaloRows) * (kGramColumns + 2 * kHaloColumns + 2);
constexpr int64_t kMinGramBins = 256;             // the Gram form is expected to win from there on
constexpr int64_t kMinValues = int64_t(1) << 20;  // bands up to this size are allowed whatever the pooled form needs

// One call of the loss.
struct Distillation {
  Problem problem;
  Maps map[2], gradient[2];  // apprentice, expert; gradients that are not wanted are empty
  Numbers factor;            // of all weights: [K], or one number (stride 0), or not given
  Algorithm algorithm = Algorithm::kPooled;
  void* losses = nullptr;  // out [K]; only without gradients
  void* total = nullptr;   // out [1]; both of the accumulation type
};

// Whether a training step takes the Gram form, with these tables: by shapes alone, where both networks' maps agree in
// them and all maps in their element type. Where it is asked for, it is still refused where its workspace would be
// larger than that of pooled differences and not small either, as for adaptive sampling on large maps, whose bands have
// no bound but the map.
template <class T>
bool choose_gram(const Distillation& call, const TablePlan<T>& plan, const BlockSizes& blocks, int32_t* first_tile) {
  const Tables<T>& tables = plan.tables;
  if (call.algorithm == Algorithm::kPooled || call.problem.boxes == 0 || !plan.fits) return false;
  if (call.gradient[0].empty() && call.gradient[1].empty()) return false;
  if (call.algorithm == Algorithm::kByShape && call.problem.bins[0] * call.problem.bins[1] < kMinGramBins) return false;
  int64_t tiles = 0, values = 0;
  for (int l = 0; l < tables.levels; ++l) {
    const Level& level = tables.level[l];
    const Number type = call.map[0][0].type;
    if (level.sides == 2 || call.map[0][l].type != type || call.map[1][l].type != type) return false;
    tiles += tile_count(tables, level, 0, blocks.gram / kGramColumns * kQuad, kGramRows, kGramColumns);
    if (tiles > kMaxBlocks) return false;
    first_tile[l + 1] = static_cast<int32_t>(tiles);
    for (const AxisLayout& axis : level.axis[0]) values += tables.boxes * axis.values;
  }
  return values <= kMinValues || values <= plan.pooled;
}

// first_tile: as choose_gram() left it.
template <class E, class T, class Memory>
void distill_gram(Memory& memory, const Distillation& call, TablePlan<T>& plan, const int32_t* first_tile,
                  const BlockSizes& blocks, cudaStream_t stream) {
  static_assert(sizeof(GramGradient<E>) <= 4096, "parameters of a kernel");
  static_assert(kStageCells <= kMaxStageCells, "cells of the stage are divided by its columns");
  GramGradient<E> gradient{};
  std::copy_n(first_tile, kMaxLevels + 1, gradient.first_tile);
  const dim3 grid(static_cast<unsigned>(first_tile[plan.tables.levels]));
  memory.lay_out([&](auto& arena) {
    plan.place(arena);
    gradient.partial = arena.template take<double>(grid.x);
    gradient.finished = plan.build.finished = arena.template take<int32_t>(1);
  });
  gradient.tables = plan.tables;
  for (int side = 0; side < 2; ++side) {
    gradient.map[side] = pyramid(call.map[side]);
    gradient.gradient[side] = pyramid(call.gradient[side]);
  }
  gradient.total = static_cast<T*>(call.total);
  plan.launch(blocks, stream);
  const size_t fixed = gram_shared_bytes<T>(blocks.gram), cell = blocks.gram / kGramColumns * sizeof(Quad<T>);
  const size_t room = fixed < kSharedBytes ? (kSharedBytes - fixed) / cell : 0;
  gradient.stage_cells = static_cast<int32_t>(std::min<size_t>(room, kStageCells));
  RAKD_LAUNCH((gram_gradient<E>), grid, dim3(blocks.gram), fixed + gradient.stage_cells * cell, stream, gradient);
}

// The loss, with the gradients that are wanted. Tells whether it took the Gram form.
template <class T, class Memory>
bool distill(Memory& memory, const Distillation& call, const BlockSizes& blocks, cudaStream_t stream) {
  TablePlan<T> with_bands(call.problem, call.map[0], &call.map[1], true);
  with_bands.build.factor = call.factor;
  int32_t first_tile[kMaxLevels + 1] = {0};
  if (choose_gram(call, with_bands, blocks, first_tile)) {
    const auto run = [&](auto element) {
      distill_gram<decltype(element)>(memory, call, with_bands, first_tile, blocks, stream);
    };
    if constexpr (sizeof(T) == sizeof(double)) {
      run(double());
    } else {
      with_element_type<T>(call.map[0][0].type, run);
    }
    return true;
  }
  const bool gradients = !call.gradient[0].empty() || !call.gradient[1].empty();
  TablePlan<T> plan(call.problem, call.map[0], &call.map[1]);
  plan.build.factor = call.factor;
  RoiAlignForward<T> forward{};
  forward.tables = plan.tables;
  const unsigned grid = choose_blocks<true>(forward);
  memory.lay_out([&](auto& arena) {
    plan.place(arena);
    forward.partial = arena.template take<double>(grid);
    if (gradients) forward.pooled = arena.template take<T>(plan.pooled);
  });
  forward.tables = plan.tables;  // with their memory
  for (int side = 0; side < 2; ++side) forward.map[side] = pyramid(call.map[side]);
  plan.launch(blocks, stream);
  launch_forward<true>(forward, grid, blocks, stream);
  RoiAlignBackward<T> backward{};  // adds the losses even where no gradient is wanted
  backward.tables = plan.tables;
  for (int side = 0; side < 2; ++side) backward.gradient[side] = pyramid(call.gradient[side]);
  backward.pooled = forward.pooled;
  backward.sum = {forward.partial, forward.group, static_cast<T*>(call.losses), static_cast<T*>(call.total)};
  launch_backward<T, void>(backward, blocks, stream);
  return false;
}

}  // namespace gpu
}  // namespace rakd
