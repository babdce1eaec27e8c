// Host side of the Gram form of the loss and its gradient: when it is chosen, its workspace, its two launches
// (make_gram, gram_gradient). Free of torch, as launch.h.
#pragma once

#include "gram.cuh"
#include "launch.h"

namespace rakd {
namespace gpu {

// What the caller wants of the two forms of a training step.
enum class Form { kByShape, kPooled, kGram };

// Elements of the workspace, and the larger count of the largest room; beyond kMaxRoom nothing may be launched.
struct GramSizes {
  int64_t ints = 0, values = 0, room = 0;
};

// Cells of a tile with its rim; more are not worth the memory.
constexpr int32_t kStageCells = (kGramRows + 2 * kHaloRows) * (kGramColumns + 2 * kHaloColumns + 2);
constexpr int64_t kEnoughBins = 256;               // from where the Gram form is expected to win
constexpr int64_t kFreeValues = int64_t(1) << 20;  // of bands, whatever the pooled form needs

// double has half the channels a block.
template <class T>
int gram_threads(const BlockSizes& blocks) {
  return sizeof(T) == sizeof(double) && blocks.gram > 32 ? blocks.gram / 2 : blocks.gram;
}

template <class T>
int64_t gram_slabs(int64_t channels, const BlockSizes& blocks) {
  const int64_t slab = gram_threads<T>(blocks) / kGramColumns * kQuad;
  return (channels + slab - 1) / slab;
}

// Fills all but the pointers, from boxes, levels, images, sizes, bins and sampling_ratio of the sampling tables.
template <class T>
GramSizes plan_gram(GramTables<T>& gram, const Tables<T>& tables) {
  gram.boxes = tables.boxes;
  gram.levels = tables.levels;
  gram.images = tables.images;
  GramSizes sizes;
  int64_t ints = 0, values = 0;
  for (int level = 0; level < tables.levels; ++level) {
    const int64_t ints_before = ints, values_before = values;
    for (int axis = 0; axis < 2; ++axis) {
      const int32_t size = gram.size[level][axis] = tables.size[0][level][axis];
      const int64_t cells = axis_capacity(size, tables.bins[axis], tables.sampling_ratio).cells;
      const int64_t pitch = gram_band_capacity(cells, tables.sampling_ratio);
      gram.axis[level][axis] =
          BandLayout{static_cast<int32_t>(ints - ints_before), static_cast<int32_t>(values - values_before),
                     static_cast<int32_t>(cells), static_cast<int32_t>(pitch)};
      ints += band_int_count(cells);
      values += cells * pitch;
      sizes.room = ints > values ? ints : values;
      if (sizes.room > kMaxRoom) return sizes;
    }
    gram.level[level] =
        LevelLayout{static_cast<int32_t>(ints - ints_before), static_cast<int32_t>(values - values_before),
                    static_cast<int32_t>(ints_before), static_cast<int32_t>(values_before)};
  }
  sizes.ints = tables.boxes * ints;
  sizes.values = tables.boxes * values;
  return sizes;
}

// Blocks of the second launch.
template <class T>
int64_t gram_blocks(const GramTables<T>& gram, int64_t channels, const BlockSizes& blocks) {
  int64_t tiles = 0;
  for (int level = 0; level < gram.levels; ++level) {
    tiles += tile_count(gram.images, gram.size[level][0], gram.size[level][1], kGramRows, kGramColumns);
  }
  return tiles * gram_slabs<T>(channels, blocks);
}

// Whether a training step of both networks' maps of one shape takes the Gram form; by shape alone. Where it is asked
// for, it is still refused where its workspace would be larger than that of pooled differences and not small either, as
// for adaptive sampling on large maps, whose bands have no bound but the map.
template <class T>
bool choose_gram(Form form, const GramTables<T>& gram, const GramSizes& sizes, int64_t bins, int64_t channels,
                 const BlockSizes& blocks) {
  if (form == Form::kPooled || gram.boxes == 0 || sizes.room > kMaxRoom) return false;
  if (form == Form::kByShape && bins < kEnoughBins) return false;
  const int64_t pooled = gram.boxes * gram.levels * slabs_of(channels) * kSlab * bins;
  if (sizes.values > kFreeValues && sizes.values > pooled) return false;
  return gram_blocks(gram, channels, blocks) <= INT32_MAX && gram_slabs<T>(channels, blocks) <= kMaxGrid;
}

template <class T>
void launch_make_gram(const Tables<T>& tables, const GramTables<T>& gram, int32_t* finished, const BlockSizes& blocks,
                      cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(tables.levels), box_grid(tables.boxes), box_rounds(tables.boxes));
  int64_t ints = 0, weights = 0;
  for (int level = 0; tables.in_shared && level < tables.levels; ++level) {
    ints = tables.level[level].ints > ints ? tables.level[level].ints : ints;
    weights = tables.level[level].weights > weights ? tables.level[level].weights : weights;
  }
  RAKD_LAUNCH((make_gram<T>), grid, dim3(blocks.tables), gram_tables_shared_bytes<T>(ints, weights), stream, tables,
              gram, finished);
}

// Fills call.first_tile and call.stage_cells.
template <class E>
void launch_gram_gradient(GramGradient<E> call, const BlockSizes& blocks, cudaStream_t stream) {
  typedef typename Accumulator<E>::type T;
  static_assert(sizeof(call) <= 4096, "parameters of a kernel");
  static_assert(kStageCells <= kMaxStageCells, "cells of the stage are divided by its columns");
  const GramTables<T>& gram = call.tables;
  call.first_tile[0] = 0;
  for (int level = 0; level < gram.levels; ++level) {
    const int64_t tiles = tile_count(gram.images, gram.size[level][0], gram.size[level][1], kGramRows, kGramColumns);
    call.first_tile[level + 1] = call.first_tile[level] + static_cast<int32_t>(tiles);
  }
  const int threads = gram_threads<T>(blocks);
  const size_t fixed = gram_shared_bytes<T>(threads), cell = threads / kGramColumns * sizeof(Quad<T>);
  const size_t room = fixed < kSharedBytes ? (kSharedBytes - fixed) / cell : 0;
  call.stage_cells = room < kStageCells ? static_cast<int32_t>(room) : kStageCells;
  const dim3 grid(static_cast<unsigned>(call.first_tile[gram.levels]),
                  static_cast<unsigned>(gram_slabs<T>(call.channels, blocks)));
  RAKD_LAUNCH((gram_gradient<E>), grid, dim3(threads), fixed + call.stage_cells * cell, stream, call);
}

}  // namespace gpu
}  // namespace rakd
