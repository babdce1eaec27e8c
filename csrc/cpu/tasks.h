// Tasks of the CPU ops: channel blocks of images and levels, the clearing of channels-last gradients, and the workers'
// scratch.
#pragma once

#include <vector>

#include "nontemporal_store.h"
#include "tensors.h"
#include "threads.h"

namespace rakd {

// Values of the computation's type that one worker's buffers need; see Scratch.
struct ScratchSizes {
  int64_t values[2] = {0, 0}, gradients[2] = {0, 0}, sums = 0, pooled = 0;

  void include(const ScratchSizes& other) {
    for (int side = 0; side < 2; ++side) {
      values[side] = std::max(values[side], other.values[side]);
      gradients[side] = std::max(gradients[side], other.gradients[side]);
    }
    sums = std::max(sums, other.sums);
    pooled = std::max(pooled, other.pooled);
  }
};

// One worker's buffers in one allocation, each on a cache line of its own.
template <class T>
struct WorkerScratch {
  explicit WorkerScratch(const ScratchSizes& s) {
    const int64_t counts[8] = {s.values[0], s.values[1], s.gradients[0], s.gradients[1],
                               s.sums,      s.sums,      s.pooled,       s.pooled};
    size_t at[9] = {0};
    for (int i = 0; i < 8; ++i) at[i + 1] = at[i] + (counts[i] * sizeof(T) + kLine - 1) / kLine * kLine;
    memory = Buffer(at[8]);
    const auto buffer = [&](int i) { return reinterpret_cast<T*>(memory.data() + at[i]); };
    scratch = {{buffer(0), buffer(1)}, {buffer(2), buffer(3)}, {buffer(4), buffer(5)}, {buffer(6), buffer(7)}};
  }
  Scratch<T> scratch;
  Buffer memory;
};

// One (level, image, channel block), or a run of cells of a channels-last gradient to be cleared.
struct Item {
  int64_t level, image;
  ChannelBlock channels;
  int64_t clear_side = -1;  // 0, 1: clear cells [begin, end) of that side's gradient, but for the support
  int64_t begin = 0, end = 0;
};

// The items of a call, the scratch that they need, and about how many values they compute.
struct Work {
  std::vector<Item> items;
  ScratchSizes sizes;
  int64_t values = 0;

  // All channels of an image and level in blocks; channel_values: those that one channel computes.
  void add_blocks(int64_t level, int64_t image, int64_t channels, int64_t width, int64_t channel_values,
                  const ScratchSizes& needed) {
    for (int64_t c = 0; c < channels; c += width) {
      items.push_back(Item{level, image, ChannelBlock{c, std::min(width, channels - c), width}});
    }
    sizes.include(needed);
    values += channels * channel_values;
  }
};

// Width of the vector blocks: the channels that make a cache line.
template <class T>
int64_t block_width(int64_t channels) {
  constexpr int64_t kWidth = kLine / sizeof(T);
  return kWidth > 8 && channels <= 8 ? 8 : kWidth;
}

// Values that one channel computes on a plan.
template <class T>
int64_t plan_values(const Plan<T>& plan, int64_t bins) {
  return plan.cells + 2 * plan.patch_count * bins;
}

// Clearing of one gradient [B, C, H, W], if it is channels-last; channels-first ones are written whole by their blocks.
// The pieces end at the ends of huge pages, and come before all other tasks, as they are the first to touch fresh
// memory: where two threads touch one page at the same time, the system makes it twice.
inline void append_clearing(Work& work, int64_t level, int64_t side, const MapBatch& map) {
  if (map.stride[3] == 1) return;
  const int64_t cell = map.channels * map.element_size, cells = map.height * map.width;
  work.values += map.batch * cells * cell / 8;
  for (int64_t image = 0; image < map.batch; ++image) {
    const auto data = reinterpret_cast<uintptr_t>(map.data) + static_cast<uintptr_t>(image * cells * cell);
    for (int64_t begin = 0; begin < cells;) {
      const uintptr_t at = data + static_cast<uintptr_t>(begin * cell);
      const auto left = static_cast<int64_t>(kHugePage - at % kHugePage);
      const int64_t end = std::min(cells, begin + (left + cell - 1) / cell);
      work.items.push_back(Item{level, image, {}, side, begin, end});
      begin = end;
    }
  }
}

// Zeros in those of a channels-last image's cells [item.begin, item.end) that no patch touches.
template <class T>
void clear_outside_support(const Plan<T>& plan, const MapBatch& map, const Item& item) {
  const int64_t cell = map.channels * map.element_size;
  char* data = map.data + item.image * map.height * map.width * cell;
  const auto before = [&](const Segment& s, int64_t at) { return s.row * map.width + s.end <= at; };
  const Segment *const first = plan.segments, *const last = first + plan.segment_count;
  int64_t written = item.begin;
  for (const Segment* s = std::lower_bound(first, last, item.begin, before); s != last; ++s) {
    const int64_t begin = s->row * map.width + s->begin;
    if (begin >= item.end) break;
    if (begin > written) stream_zeros(data + written * cell, (begin - written) * cell);
    written = begin + s->end - s->begin;
  }
  if (written < item.end) stream_zeros(data + written * cell, (item.end - written) * cell);
  finish_streams();
}

// Calls run(i, scratch) for each item.
template <class T, class F>
void run_items(const Work& work, const F& run) {
  const auto count = static_cast<int64_t>(work.items.size());
  const int64_t threads = thread_count(count, work.values);
  std::vector<WorkerScratch<T>> workers;
  workers.reserve(threads);
  for (int64_t i = 0; i < threads; ++i) workers.emplace_back(work.sizes);
  for_each_task(count, threads, [&](int64_t i, int64_t worker) { run(i, workers[worker].scratch); });
}

// Wrong values of environment variables are errors before any thread meets them.
inline void check_environment() {
  kernel_table();
  check_cache_limit();
}

}  // namespace rakd
