// Builds the plans of plan.h: sampling tables per box and axis, and the union of the touched cells.
#include "plan.h"

#include <algorithm>

namespace rakd {
namespace {

// Table of one axis in double, before it is narrowed and stored; buffers are reused from box to box.
class AxisBuilder {
 public:
  void build(AxisSamples samples, int64_t bins, int64_t size, int64_t sampling_ratio) {
    const AxisCapacity capacity = axis_capacity(size, bins, sampling_ratio);
    for (auto* array : {&cell_, &cell_bin_}) grow(*array, capacity.cells + 1);
    for (auto* array : {&bin_cell_, &bin_offset_, &bin_new_}) grow(*array, bins + 1);
    grow(pool_, capacity.weights);
    table = AxisTable<double>{&count,          cell_.data(), cell_bin_.data(), bin_cell_.data(), bin_offset_.data(),
                              bin_new_.data(), pool_.data()};
    this->bins = static_cast<int32_t>(bins);
    if (samples.samples <= kMostOffsets) {
      for (int64_t i = 0; i < samples.samples; ++i) offset_[i] = sample_offset(samples, i);
      samples.offset = offset_;
    }
    for (int32_t bin = 0; bin < this->bins; ++bin) count_cells(samples, size, bin, table);
    link_bins(size, this->bins, table);
    for (int32_t bin = 0; bin < this->bins; ++bin) fill_bin(samples, size, bin, table);
  }
  void clear() { build(AxisSamples{0.0, 0.0, 0}, bins, 1, 1); }

  AxisTable<double> table{};
  int32_t count = 0, bins = 0;

 private:
  static constexpr int64_t kMostOffsets = 64;

  template <class U>
  static void grow(std::vector<U>& array, int64_t count) {
    if (static_cast<int64_t>(array.size()) < count) array.resize(count);
  }

  std::vector<int32_t> cell_, cell_bin_, bin_cell_, bin_offset_, bin_new_;
  std::vector<double> pool_;
  double offset_[kMostOffsets];
};

template <class T>
Axis<T> store_axis(Arena& arena, const AxisBuilder& built) {
  const AxisTable<double>& table = built.table;
  const int32_t bins = built.bins;
  return Axis<T>{built.count,
                 bins,
                 arena.copy<int32_t>(table.cell, built.count),
                 arena.copy<int32_t>(table.bin_cell, bins),
                 arena.copy<int32_t>(table.bin_offset, bins + 1),
                 arena.copy<int32_t>(table.bin_new, bins),
                 arena.copy<T>(table.pool, table.bin_offset[bins])};
}

using Interval = std::pair<int32_t, int32_t>;  // [first, second)

// Adds an interval to sorted disjoint ones; touching ones merge.
void merge_interval(std::vector<Interval>& row, Interval added) {
  auto first =
      std::lower_bound(row.begin(), row.end(), added.first, [](const Interval& a, int32_t x) { return a.second < x; });
  auto last = first;
  while (last != row.end() && last->first <= added.second) {
    added.first = std::min(added.first, last->first);
    added.second = std::max(added.second, last->second);
    ++last;
  }
  if (first == last) {
    row.insert(first, added);
  } else {
    *first = added;
    row.erase(first + 1, last);
  }
}

// Lays the union of the touched cells out in scratch and tells each patch where its rows lie.
template <class T>
void place_patches(Plan<T>& plan, std::vector<Patch<T>>& patches) {
  int64_t top = plan.height, bottom = 0;
  for (const auto& patch : patches) {
    if (patch.y.count == 0 || patch.x.count == 0) continue;
    top = std::min<int64_t>(top, patch.y.cell[0]);
    bottom = std::max<int64_t>(bottom, patch.y.cell[patch.y.count - 1] + 1);
  }
  if (top >= bottom) return;
  std::vector<std::vector<Interval>> rows(bottom - top);
  for (const auto& patch : patches) {
    if (patch.x.count == 0) continue;
    const Interval columns{patch.x.cell[0], patch.x.cell[patch.x.count - 1] + 1};
    for (int32_t i = 0; i < patch.y.count; ++i) merge_interval(rows[patch.y.cell[i] - top], columns);
  }
  plan.pixels = kGap;
  std::vector<Segment> segments;
  std::vector<size_t> first_segment(rows.size() + 1, 0);
  for (size_t r = 0; r < rows.size(); ++r) {
    first_segment[r] = segments.size();
    for (const auto& [begin, end] : rows[r]) {
      segments.push_back(Segment{top + static_cast<int64_t>(r), begin, end, plan.pixels, -1});
      plan.pixels += end - begin + kGap;
    }
  }
  first_segment[rows.size()] = segments.size();
  for (auto& patch : patches) {
    if (patch.x.count == 0) continue;
    auto* base = plan.arena.template take<int64_t>(patch.y.count);
    for (int32_t i = 0; i < patch.y.count; ++i) {
      const size_t r = static_cast<size_t>(patch.y.cell[i] - top);
      auto segment = segments.begin() + first_segment[r];
      while (segment->end <= patch.x.cell[0]) ++segment;
      base[i] = segment->offset - segment->begin;
    }
    patch.row_base = base;
  }
  plan.segment_count = static_cast<int64_t>(segments.size());
  plan.segments = plan.arena.template take<Segment>(plan.segment_count);
  std::copy(segments.begin(), segments.end(), plan.segments);
}

// Lays out compact scratch for gradients.
template <class T>
void place_gradients(Plan<T>& plan, std::vector<Patch<T>>& patches) {
  const SegmentsOfRows rows(plan.segments, plan.segment_count);
  for (auto& patch : patches) {
    if (patch.assembled || patch.x.count == 0) continue;
    auto* base = plan.arena.template take<int64_t>(patch.y.count);
    for (int32_t i = 0; i < patch.y.count; ++i) {
      Segment* segment = plan.segments + rows.begin(patch.y.cell[i]);
      while (segment->end <= patch.x.cell[0]) ++segment;
      if (segment->gradient < 0) {
        segment->gradient = plan.gradient_pixels;
        plan.gradient_pixels += segment->end - segment->begin;
      }
      base[i] = segment->gradient - segment->begin;
    }
    patch.gradient_base = base;
  }
}

}  // namespace

template <class T>
Plan<T> build_plan(const PlanRequest& request) {
  Plan<T> plan;
  plan.height = request.height;
  plan.width = request.width;
  std::vector<Patch<T>> patches;
  patches.reserve(request.selected->size());
  AxisBuilder y, x;
  for (const int64_t k : *request.selected) {
    const double scale = request.scales[k * request.scale_stride];
    if (scale == 0.0) continue;
    const double* box = request.boxes + 5 * k;
    const int64_t ratio = request.sampling_ratio;
    y.build(axis_samples(box[2], box[4], request.stride, request.bins_y, ratio), request.bins_y, request.height, ratio);
    x.build(axis_samples(box[1], box[3], request.stride, request.bins_x, ratio), request.bins_x, request.width, ratio);
    if (y.count == 0 || x.count == 0) {  // outside along one axis: nothing along the other either
      y.clear();
      x.clear();
    }
    Patch<T> patch{};
    patch.box = k;
    patch.scale = scale;
    patch.y = store_axis<T>(plan.arena, y);
    patch.x = store_axis<T>(plan.arena, x);
    plan.rows = std::max<int64_t>(plan.rows, y.count);
    patches.push_back(patch);
  }
  place_patches(plan, patches);
  plan.patch_count = static_cast<int64_t>(patches.size());
  if (request.channel_blocks > 0 && plan.pixels > 0) {
    const bool chosen = choose_assembled(plan, patches.data(), request.channel_blocks, request.gradients);
    if (request.gradients) place_gradients(plan, patches);
    if (chosen) assemble_operator(plan, patches.data());
  }
  plan.patches = plan.arena.template copy<Patch<T>>(patches.data(), plan.patch_count);
  return plan;
}

template Plan<float> build_plan<float>(const PlanRequest&);
template Plan<double> build_plan<double>(const PlanRequest&);

}  // namespace rakd
