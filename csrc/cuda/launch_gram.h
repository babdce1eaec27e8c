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

// double has half the channels a block.
template <class T>
int gram_threads(const BlockSizes& blocks) {
  return sizeof(T) == sizeof(double) && blocks.gram > 32 ? blocks.gram / 2 : blocks.gram;
}

// One call of the loss.
struct Distillation {
  Problem problem;
  Maps map[2], gradient[2];  // apprentice, expert; gradients that are not wanted are empty
  Numbers factor;            // of all weights: [K], or one number (stride 0), or not given
  Algorithm algorithm = Algorithm::kPooled;
  void* losses = nullptr;  // out [K]; only without gradients
  void* total = nullptr;   // out [1]; both of the accumulation type
};

// Bands without memory, and the memory that they need.
template <class T>
struct GramPlan {
  GramTables<T> tables{};
  int64_t slice_bytes = 0, values = 0, blocks = 0;  // bytes of all slices, values in them, blocks of gram_gradient
  bool fits = true;

  GramPlan(const Tables<T>& from, const BlockSizes& sizes) {
    tables.boxes = from.boxes;
    tables.levels = from.levels;
    tables.images = from.images;
    tables.index = from.index;
    const int64_t block_channels = gram_threads<T>(sizes) / kGramColumns * kQuad;
    for (int l = 0; l < from.levels; ++l) {
      BandLayout& layout = tables.level[l];
      const AxisLayout* axis = from.level[l].side[0].axis;
      int64_t bytes = 0;
      for (int i = 0; i < 2; ++i) {
        const int64_t cells = axis[i].cells, pitch = gram_band_capacity(cells, from.sampling_ratio);
        layout.axis[i] =
            BandAxis{axis[i].size, axis[i].cells, static_cast<int32_t>(pitch), static_cast<int32_t>(bytes)};
        bytes += band_bytes<T>(cells, pitch);
        fits = fits && bytes <= kMaxBlocks;
        values += from.boxes * cells * pitch;
      }
      layout.channels = from.level[l].channels;
      layout.first = slice_bytes;
      layout.bytes = static_cast<int32_t>(bytes);
      slice_bytes += from.boxes * bytes;
      const int64_t channel_blocks = (layout.channels + block_channels - 1) / block_channels;
      blocks += tile_count(from.images, axis, channel_blocks, kGramRows, kGramColumns);
    }
    fits = fits && blocks <= kMaxBlocks;
  }
};

// Whether a training step takes the Gram form: by shapes alone, where both networks' maps agree in them and all maps in
// their element type. Where it is asked for, it is still refused where its workspace would be larger than that of
// pooled differences and not small either, as for adaptive sampling on large maps, whose bands have no bound but the
// map.
template <class T>
bool choose_gram(const Distillation& call, const TablePlan<T>& plan, const GramPlan<T>& gram) {
  if (call.algorithm == Algorithm::kPooled || call.problem.boxes == 0 || !gram.fits) return false;
  if (call.gradient[0].empty() && call.gradient[1].empty()) return false;
  if (call.algorithm == Algorithm::kByShape && call.problem.bins[0] * call.problem.bins[1] < kMinGramBins) return false;
  for (int l = 0; l < plan.tables.levels; ++l) {
    const Number type = call.map[0][0].view.type;
    const bool same = call.map[0][l].view.type == type && call.map[1][l].view.type == type;
    if (plan.tables.level[l].sides == 2 || !same) return false;
  }
  return gram.values <= kMinValues || gram.values <= plan.pooled;
}

// Fills call.first_tile and call.stage_cells.
template <class E, class T>
void launch_gram_gradient(GramGradient<E> call, const BlockSizes& blocks, const Tables<T>& from, cudaStream_t stream) {
  static_assert(sizeof(call) <= 4096, "parameters of a kernel");
  static_assert(kStageCells <= kMaxStageCells, "cells of the stage are divided by its columns");
  const int threads = gram_threads<T>(blocks);
  const int64_t block_channels = threads / kGramColumns * kQuad;
  call.first_tile[0] = 0;
  for (int l = 0; l < from.levels; ++l) {
    const int64_t channel_blocks = (from.level[l].channels + block_channels - 1) / block_channels;
    const int64_t tiles = tile_count(from.images, from.level[l].side[0].axis, channel_blocks, kGramRows, kGramColumns);
    call.first_tile[l + 1] = call.first_tile[l] + static_cast<int32_t>(tiles);
  }
  const size_t fixed = gram_shared_bytes<T>(threads), cell = threads / kGramColumns * sizeof(Quad<T>);
  const size_t room = fixed < kSharedBytes ? (kSharedBytes - fixed) / cell : 0;
  call.stage_cells = room < kStageCells ? static_cast<int32_t>(room) : kStageCells;
  const dim3 grid(static_cast<unsigned>(call.first_tile[from.levels]));
  RAKD_LAUNCH((gram_gradient<E>), grid, dim3(threads), fixed + call.stage_cells * cell, stream, call);
}

template <class E, class T, class Memory>
void distill_gram(Memory& memory, const Distillation& call, TablePlan<T>& plan, GramPlan<T>& gram,
                  const BlockSizes& blocks, cudaStream_t stream) {
  GramGradient<E> gradient{};
  memory.lay_out([&](auto& arena) {
    plan.place(arena);
    gram.tables.slices = arena.template take<unsigned char>(gram.slice_bytes);
    gradient.partial = arena.template take<double>(gram.blocks);
    gradient.finished = arena.template take<int32_t>(1);
  });
  gram.tables.extents = plan.tables.extents;
  gram.tables.scales = plan.tables.scales;
  gradient.tables = gram.tables;
  for (int side = 0; side < 2; ++side) {
    gradient.map[side] = pyramid(call.map[side]);
    gradient.gradient[side] = pyramid(call.gradient[side]);
  }
  gradient.total = static_cast<T*>(call.total);
  launch_tables(plan.tables, call.factor, blocks, stream);
  const dim3 grid(static_cast<unsigned>(plan.tables.levels * plan.tables.boxes));
  RAKD_LAUNCH((build_bands<T>), grid, dim3(blocks.tables), 0, stream, plan.tables, gram.tables, gradient.finished);
  launch_gram_gradient(gradient, blocks, plan.tables, stream);
}

// The loss, with the gradients that are wanted. Tells whether it took the Gram form.
template <class T, class Memory>
bool distill(Memory& memory, const Distillation& call, const BlockSizes& blocks, cudaStream_t stream) {
  TablePlan<T> plan(call.problem, call.map[0], &call.map[1]);
  GramPlan<T> gram(plan.tables, blocks);
  if (choose_gram(call, plan, gram)) {
    const Number type = call.map[0][0].view.type;
    if constexpr (sizeof(T) == sizeof(double)) {
      distill_gram<double>(memory, call, plan, gram, blocks, stream);
    } else if (type == Number::kHalf) {
      distill_gram<__half>(memory, call, plan, gram, blocks, stream);
    } else if (type == Number::kBFloat16) {
      distill_gram<__nv_bfloat16>(memory, call, plan, gram, blocks, stream);
    } else {
      distill_gram<float>(memory, call, plan, gram, blocks, stream);
    }
    return true;
  }
  const bool gradients = !call.gradient[0].empty() || !call.gradient[1].empty();
  DistillPool<T> pool{};
  pool.group = choose_group(plan.tables, plan.tables.boxes * plan.tables.levels);
  memory.lay_out([&](auto& arena) {
    plan.place(arena);
    pool.partial = arena.template take<double>(distill_blocks(plan.tables, pool.group));
    if (gradients) pool.pooled = arena.template take<T>(plan.pooled);
  });
  pool.tables = plan.tables;
  for (int side = 0; side < 2; ++side) pool.map[side] = pyramid(call.map[side]);
  if (call.problem.boxes > 0) {
    launch_tables(plan.tables, call.factor, blocks, stream);
    launch_distill_pool(pool, blocks, stream);
  }
  const SumLosses<T> sum{pool.partial, pool.group, static_cast<T*>(call.losses), static_cast<T*>(call.total)};
  if (!gradients) {
    launch_sum_losses(plan.tables, sum, blocks, stream);
    return false;
  }
  RoiAlignBackward<T> backward{};
  backward.tables = plan.tables;
  for (int side = 0; side < 2; ++side) backward.gradient[side] = pyramid(call.gradient[side]);
  backward.pooled = pool.pooled;
  backward.sum = sum;
  launch_backward<T, void>(backward, blocks, stream);
  return false;
}

}  // namespace gpu
}  // namespace rakd
