// The part that all CPU ops share: options, scales of boxes on levels, plans, channel blocks, zero fill.
#pragma once

#include <vector>

#include "dispatch.h"
#include "stream.h"
#include "tensors.h"

namespace rakd {

using DoubleList = std::vector<double>;
using IntList = std::vector<int64_t>;

struct Options {
  int64_t bins_y, bins_x, sampling_ratio;
  LevelRule rule;

  Options(const IntList& output_size, int64_t sampling_ratio, int64_t assignment, double sigma, double canonical_size,
          double canonical_level)
      : bins_y(0),
        bins_x(0),
        sampling_ratio(sampling_ratio),
        rule{static_cast<Assignment>(assignment), sigma, canonical_size, canonical_level} {
    STD_TORCH_CHECK(output_size.size() == 2 && output_size[0] > 0 && output_size[1] > 0,
                    "output_size: expected two positive numbers");
    STD_TORCH_CHECK(assignment >= 0 && assignment <= 2, "assignment: expected 0, 1 or 2");
    bins_y = output_size[0];
    bins_x = output_size[1];
  }
  int64_t bins() const { return bins_y * bins_x; }
};

// [K, L]: level weight times the box's coefficient (if any) times `factor`.
inline DoubleList level_scales(const Boxes& boxes, const double* coefficients, const DoubleList& strides,
                               const LevelRule& rule, double factor) {
  const auto levels = static_cast<int64_t>(strides.size());
  DoubleList level_of, scales(boxes.count * levels);
  for (const double stride : strides) level_of.push_back(std::log2(stride));
  for (int64_t k = 0; k < boxes.count; ++k) {
    const double* box = boxes.data + 5 * k;
    double* row = scales.data() + k * levels;
    level_weights(box[3] - box[1], box[4] - box[2], level_of.data(), levels, rule, row);
    for (int64_t l = 0; l < levels; ++l) row[l] *= factor * (coefficients ? coefficients[k] : 1.0);
  }
  return scales;
}

// Width of the vector blocks: the channels that make a cache line.
template <class T>
int64_t block_width(int64_t channels) {
  constexpr int64_t kWidth = kLine / sizeof(T);
  return kWidth > 8 && channels <= 8 ? 8 : kWidth;
}

// Plans of all (level, image) pairs, level-major, built in parallel: they share nothing. `assemble` tells for each
// level whether patches may go into a Gram operator, `gradients` what it would be applied for.
template <class T>
std::vector<Plan<T>> build_plans(const Boxes& boxes, const DoubleList& scales, const DoubleList& strides,
                                 const std::vector<MapBatch>& maps, const Options& options,
                                 const std::vector<bool>& assemble = {}, bool gradients = true) {
  const int64_t batch = maps[0].batch, levels = static_cast<int64_t>(maps.size());
  std::vector<Plan<T>> plans(levels * batch);
  // Fine levels take longest: whoever is free takes the next.
  for_each_task(levels * batch, [&](int64_t i, int64_t) {
    const int64_t l = i / batch;
    PlanRequest request;
    request.boxes = boxes.data;
    request.selected = &boxes.of_image[i % batch];
    request.scales = scales.data() + l;
    request.scale_stride = levels;
    request.stride = strides[l];
    request.height = maps[l].height;
    request.width = maps[l].width;
    request.bins_y = options.bins_y;
    request.bins_x = options.bins_x;
    request.sampling_ratio = options.sampling_ratio;
    if (!assemble.empty() && assemble[l]) {
      const int64_t width = block_width<T>(maps[l].channels);
      request.channel_blocks = (maps[l].channels + width - 1) / width;
      request.gradients = gradients;
    }
    plans[i] = build_plan<T>(request);
  });
  return plans;
}

// One (level, image, channel block), or a run of cells of a channels-last gradient to be cleared.
struct Item {
  int64_t level, image;
  ChannelBlock channels;
  int64_t clear_side = -1;  // 0, 1: clear the untouched ones of cells [begin, end) of that side's gradient
  int64_t begin = 0, end = 0;
};

inline void append_blocks(std::vector<Item>& items, int64_t level, int64_t image, int64_t channels, int64_t width) {
  for (int64_t c = 0; c < channels; c += width) {
    items.push_back(Item{level, image, ChannelBlock{c, std::min(width, channels - c), width}});
  }
}

// Pieces that end where huge pages do. Fresh memory is first touched by these tasks, which therefore go before all
// others: where two threads touch one page at the same time, both make one.
inline void append_clearing(std::vector<Item>& items, int64_t level, int64_t image, int64_t side, const MapBatch& map) {
  const int64_t cell = map.channels * map.element_size, cells = map.height * map.width;
  const auto data = reinterpret_cast<uintptr_t>(map.data) + static_cast<uintptr_t>(image * cells * cell);
  for (int64_t begin = 0; begin < cells;) {
    const uintptr_t at = data + static_cast<uintptr_t>(begin * cell);
    const auto left = static_cast<int64_t>(kHugePage - at % kHugePage);
    const int64_t end = std::min(cells, begin + (left + cell - 1) / cell);
    items.push_back(Item{level, image, {}, side, begin, end});
    begin = end;
  }
}

// Zeros in those of a channels-last image's cells [item.begin, item.end) that no patch touches.
template <class T>
void clear_untouched(const Plan<T>& plan, const MapBatch& map, int64_t image, const Item& item) {
  const int64_t cell = map.channels * map.element_size;
  char* data = map.data + image * map.height * map.width * cell;
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

}  // namespace rakd
