// Tasks of the CPU ops: channel blocks of images and levels, the clearing of channels-last gradients, and the workers'
// scratch.
#pragma once

#include <vector>

#include "dispatch.h"
#include "nontemporal_store.h"
#include "tensors.h"
#include "threads.h"

namespace rakd {

// Values of the computation's type that one worker's buffers need.
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
class WorkerScratch {
 public:
  explicit WorkerScratch(const ScratchSizes& sizes) : layout_(sizes), memory_(layout_.bytes) {
    const auto at = [&](int i) { return reinterpret_cast<T*>(memory_.data() + layout_.offsets[i]); };
    scratch = Scratch<T>{{at(0), at(1)}, {at(2), at(3)}, {at(4), at(5)}, {at(6), at(7)}};
  }
  Scratch<T> scratch;

 private:
  struct Layout {
    explicit Layout(const ScratchSizes& sizes) {
      const int64_t counts[8] = {sizes.values[0], sizes.values[1], sizes.gradients[0], sizes.gradients[1],
                                 sizes.sums,      sizes.sums,      sizes.pooled,       sizes.pooled};
      for (int i = 0; i < 8; ++i) {
        offsets[i] = bytes;
        bytes += (static_cast<size_t>(counts[i]) * sizeof(T) + kLine - 1) / kLine * kLine;
      }
    }
    size_t offsets[8], bytes = 0;
  };
  Layout layout_;
  Buffer memory_;
};

// One (level, image, channel block), or a run of cells of a channels-last gradient to be cleared.
struct Item {
  int64_t level, image;
  ChannelBlock channels;
  int64_t clear_side = -1;  // 0, 1: clear the untouched ones of cells [begin, end) of that side's gradient
  int64_t begin = 0, end = 0;
};

// The items of a call, the scratch that they need, and about how many values they compute.
struct Work {
  std::vector<Item> items;
  ScratchSizes sizes;
  int64_t values = 0;

  void add(const Item& item, int64_t item_values) {
    items.push_back(item);
    values += item_values;
  }
};

// Width of the vector blocks: the channels that make a cache line.
template <class T>
int64_t block_width(int64_t channels) {
  constexpr int64_t kWidth = kLine / sizeof(T);
  return kWidth > 8 && channels <= 8 ? 8 : kWidth;
}

// Values that a block of one channel computes on a plan.
template <class T>
int64_t plan_values(const Plan<T>& plan, int64_t bins) {
  return plan.pixels + 2 * plan.patch_count * bins;
}

template <class F>
void for_each_block(int64_t channels, int64_t width, const F& f) {
  for (int64_t c = 0; c < channels; c += width) f(ChannelBlock{c, std::min(width, channels - c), width});
}

// Clearing of one gradient [B, C, H, W], if it is channels-last; channels-first ones are written whole by their blocks.
// The pieces end at the ends of huge pages, and come before all other tasks, as they are the first to touch fresh
// memory: where two threads touch one page at the same time, the system makes it twice.
inline void append_clearing(Work& work, int64_t level, int64_t side, const MapBatch& map) {
  if (!map.channels_last) return;
  const int64_t cell = map.channels * map.element_size, cells = map.height * map.width;
  for (int64_t image = 0; image < map.batch; ++image) {
    const auto data = reinterpret_cast<uintptr_t>(map.data) + static_cast<uintptr_t>(image * cells * cell);
    for (int64_t begin = 0; begin < cells;) {
      const uintptr_t at = data + static_cast<uintptr_t>(begin * cell);
      const auto left = static_cast<int64_t>(kHugePage - at % kHugePage);
      const int64_t end = std::min(cells, begin + (left + cell - 1) / cell);
      work.add(Item{level, image, {}, side, begin, end}, (end - begin) * cell / 8);
      begin = end;
    }
  }
}

// Zeros in those of a channels-last image's cells [item.begin, item.end) that no patch touches.
template <class T>
void clear_untouched(const Plan<T>& plan, const MapBatch& map, const Item& item) {
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
