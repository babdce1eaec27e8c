// Builds the plans of box_plan.h: sampling tables per box and axis, and the union of the boxes' supports.
#include "box_plan.h"

#include "threads.h"

namespace rakd {
namespace {

// Table of one axis in double, before it is stored; its buffers are reused from box to box.
class AxisBuilder {
 public:
  void build(AxisSamples samples, int64_t bins, int64_t size, int64_t sampling_ratio) {
    const AxisCapacity capacity = axis_capacity(size, bins, sampling_ratio);
    const size_t cells = capacity.cells + 1, edges = bins + 1;
    integers_.resize(std::max(integers_.size(), 2 * cells + 3 * edges));
    pool_.resize(std::max<size_t>(pool_.size(), capacity.weights));
    int32_t *cell = integers_.data(), *bin = cell + 2 * cells;
    table = AxisTable<double>{&count, cell, cell + cells, bin, bin + edges, bin + 2 * edges, pool_.data()};
    this->bins = static_cast<int32_t>(bins);
    if (samples.samples <= kMaxOffsets) {
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
  static constexpr int64_t kMaxOffsets = 64;

  std::vector<int32_t> integers_;
  std::vector<double> pool_;
  double offset_[kMaxOffsets];
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

// Builds one plan after the other; its buffers are reused.
template <class T>
class PlanBuilder {
 public:
  Plan<T> build(const BoxRows& boxes, const PlanOptions& options, const PlanLevel& level, int64_t l, int64_t image) {
    Plan<T> plan;
    plan.height = level.height;
    plan.width = level.width;
    patches_.clear();
    for (int32_t i = boxes.begin[image]; i < boxes.begin[image + 1]; ++i) {
      const int32_t k = boxes.order[i];
      const double weight = boxes.row(k)[5 + l];
      const double scale = level.factor * weight * (options.box_factor ? options.box_factor[k] : 1.0);
      // The weight by itself, since a factor that is not finite makes NaN of 0.
      if (weight != 0.0 && scale != 0.0) add_patch(plan, options, level, boxes.row(k), k, scale);
    }
    plan.patch_count = static_cast<int64_t>(patches_.size());
    lay_out(plan, options.gradients, level.channel_blocks);
    plan.patches = plan.arena.template copy<Patch<T>>(patches_.data(), plan.patch_count);
    return plan;
  }

 private:
  void add_patch(Plan<T>& plan, const PlanOptions& options, const PlanLevel& level, const double* row, int64_t box,
                 double scale) {
    const int64_t ratio = options.sampling_ratio;
    y_.build(axis_samples(row[2], row[4], level.stride, options.bins_y, ratio), options.bins_y, plan.height, ratio);
    x_.build(axis_samples(row[1], row[3], level.stride, options.bins_x, ratio), options.bins_x, plan.width, ratio);
    if (y_.count == 0 || x_.count == 0) {  // outside along one axis: nothing along the other either
      y_.clear();
      x_.clear();
    }
    Patch<T> patch{};
    patch.box = box;
    patch.scale = scale;
    patch.y = store_axis<T>(plan.arena, y_);
    patch.x = store_axis<T>(plan.arena, x_);
    plan.rows = std::max<int64_t>(plan.rows, y_.count);
    patches_.push_back(patch);
  }

  // Lays the union of the boxes' supports out in scratch and stores for each patch where its rows lie.
  void lay_out(Plan<T>& plan, bool gradients, int64_t channel_blocks) {
    int64_t top = plan.height, bottom = 0;
    for (const auto& patch : patches_) {
      if (patch.y.count == 0) continue;
      top = std::min<int64_t>(top, patch.y.cell[0]);
      bottom = std::max<int64_t>(bottom, patch.y.cell[patch.y.count - 1] + 1);
    }
    if (top >= bottom) return;
    const auto rows = static_cast<size_t>(bottom - top);
    if (rows_.size() < rows) rows_.resize(rows);
    for (size_t r = 0; r < rows; ++r) rows_[r].clear();
    for (const auto& patch : patches_) {
      if (patch.x.count == 0) continue;
      const Interval columns{patch.x.cell[0], patch.x.cell[patch.x.count - 1] + 1};
      for (int32_t i = 0; i < patch.y.count; ++i) merge_interval(rows_[patch.y.cell[i] - top], columns);
    }
    plan.cells = kGap;
    segments_.clear();
    for (size_t r = 0; r < rows; ++r) {
      for (const auto& [begin, end] : rows_[r]) {
        segments_.push_back(Segment{top + static_cast<int64_t>(r), begin, end, plan.cells, -1});
        plan.cells += end - begin + kGap;
      }
    }
    plan.segment_count = static_cast<int64_t>(segments_.size());
    plan.segments = plan.arena.template copy<Segment>(segments_.data(), plan.segment_count);
    const SegmentsOfRows of_rows(plan.segments, plan.segment_count);
    for (auto& patch : patches_) {
      patch.row_base = locate(plan, of_rows, patch, [](Segment& segment) { return segment.offset; });
    }
    if (channel_blocks == 0) return;
    const bool chosen = choose_algorithm(plan, patches_.data(), channel_blocks, gradients);
    for (auto& patch : patches_) {
      if (!gradients || patch.assembled) continue;
      patch.gradient_base = locate(plan, of_rows, patch, [&](Segment& segment) {
        if (segment.gradient < 0) {
          segment.gradient = plan.gradient_cells;
          plan.gradient_cells += segment.end - segment.begin;
        }
        return segment.gradient;
      });
    }
    if (chosen) assemble_operator(plan, patches_.data());
  }

  // [rows of the patch] where column 0 of each would lie; first_pixel(segment) is where the row's segment begins.
  template <class F>
  static const int64_t* locate(Plan<T>& plan, const SegmentsOfRows& of_rows, const Patch<T>& patch,
                               const F& first_pixel) {
    if (patch.x.count == 0) return nullptr;
    auto* base = plan.arena.template take<int64_t>(patch.y.count);
    for (int32_t i = 0; i < patch.y.count; ++i) {
      Segment* segment = plan.segments + of_rows.begin(patch.y.cell[i]);
      while (segment->end <= patch.x.cell[0]) ++segment;
      base[i] = first_pixel(*segment) - segment->begin;
    }
    return base;
  }

  AxisBuilder y_, x_;
  std::vector<Patch<T>> patches_;
  std::vector<std::vector<Interval>> rows_;
  std::vector<Segment> segments_;
};

}  // namespace

template <class T>
std::vector<Plan<T>> build_plans(const BoxRows& boxes, const PlanOptions& options,
                                 const std::vector<PlanLevel>& levels) {
  const auto count = static_cast<int64_t>(levels.size()) * boxes.images;
  const int64_t samples = (options.bins_y + options.bins_x) * std::max<int64_t>(options.sampling_ratio, 2);
  const int64_t threads = thread_count(count, 16 * samples * boxes.count * boxes.levels);
  std::vector<PlanBuilder<T>> builders(threads);
  std::vector<Plan<T>> plans(count);
  for_each_task(count, threads, [&](int64_t i, int64_t thread) {  // level by level, as the fine ones take longest
    const int64_t l = i / boxes.images;
    plans[i] = builders[thread].build(boxes, options, levels[l], l, i % boxes.images);
  });
  return plans;
}

template std::vector<Plan<float>> build_plans(const BoxRows&, const PlanOptions&, const std::vector<PlanLevel>&);
template std::vector<Plan<double>> build_plans(const BoxRows&, const PlanOptions&, const std::vector<PlanLevel>&);

}  // namespace rakd
