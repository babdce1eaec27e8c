// Builds the plans of plan.h: sampling tables per box and axis, and the union of the touched cells.
#include "plan.h"

#include <algorithm>

namespace rakd {
namespace {

// R of one axis in double, before it is narrowed and stored; buffers are reused from box to box.
struct AxisBuilder {
  std::vector<int32_t> cells;
  std::vector<int32_t> begin, end;  // per bin, in touched cells
  std::vector<int32_t> offset;      // per bin, into weight
  std::vector<double> weight;
  std::vector<int32_t> bin_begin, bin_end;    // per touched cell: the bins it feeds
  std::vector<int32_t> gram_begin, gram_end;  // per touched cell: the cells it shares a bin with
  int64_t gram_values = 0;

  void build(const AxisSamples& axis, int64_t bins, int64_t size) {
    cells.clear();
    weight.clear();
    begin.assign(bins, 0);
    end.assign(bins, 0);
    offset.assign(bins + 1, 0);
    for (int64_t bin = 0; bin < bins; ++bin) {
      offset[bin] = static_cast<int32_t>(weight.size());
      add_bin(axis, bin, size);
    }
    offset[bins] = static_cast<int32_t>(weight.size());
    transpose(bins);
  }

  void clear(int64_t bins) { build(AxisSamples{0.0, 0.0, 0}, bins, 1); }

 private:
  void add_bin(const AxisSamples& axis, int64_t bin, int64_t size) {
    int64_t first, last;
    sample_range(axis, bin, size, &first, &last);
    const size_t bin_offset = weight.size();
    bool empty = true;
    for (int64_t sample = first; sample < last; ++sample) {
      Tap tap = bilinear_tap(sample_position(axis, bin, sample), size);
      if (!tap.valid) continue;
      // Positions never decrease but for the last bit's rounding (boxes of no extent on a cell's border).
      if (low_ >= 0 && !cells.empty() && tap.low < low_) tap = Tap{true, low_, low_, 1.0, 0.0};
      low_ = tap.low;
      const int32_t local = touch(tap.low);
      if (tap.high != tap.low) touch(tap.high);
      if (empty) begin[bin] = local;
      empty = false;
      const size_t at = bin_offset + static_cast<size_t>(local - begin[bin]);
      if (weight.size() < at + 2) weight.resize(at + 2, 0.0);
      const double share = static_cast<double>(axis.samples);
      weight[at] += tap.weight_low / share;
      weight[at + 1] += tap.weight_high / share;
    }
    if (empty) {
      begin[bin] = end[bin] = static_cast<int32_t>(cells.size());
      return;
    }
    end[bin] = static_cast<int32_t>(cells.size());
    weight.resize(bin_offset + static_cast<size_t>(end[bin] - begin[bin]), 0.0);
  }

  // Position of `cell` among the touched ones, which it joins when it is new. It can only be one of the last two.
  int32_t touch(int64_t cell) {
    const auto value = static_cast<int32_t>(cell);
    const auto count = static_cast<int32_t>(cells.size());
    if (count == 0 || value > cells.back()) {
      cells.push_back(value);
      return count;
    }
    return value == cells.back() ? count - 1 : count - 2;
  }

  void transpose(int64_t bins) {
    const auto count = static_cast<int32_t>(cells.size());
    bin_begin.assign(count, static_cast<int32_t>(bins));
    bin_end.assign(count, 0);
    gram_begin.assign(count, count);
    gram_end.assign(count, 0);
    for (int64_t bin = 0; bin < bins; ++bin) {
      for (int32_t t = begin[bin]; t < end[bin]; ++t) {
        bin_begin[t] = std::min(bin_begin[t], static_cast<int32_t>(bin));
        bin_end[t] = static_cast<int32_t>(bin) + 1;
        gram_begin[t] = std::min(gram_begin[t], begin[bin]);
        gram_end[t] = std::max(gram_end[t], end[bin]);
      }
    }
    gram_values = 0;
    for (int32_t t = 0; t < count; ++t) gram_values += gram_end[t] - gram_begin[t];
    low_ = -1;
  }

  int64_t low_ = -1;  // cell of the previous sample
};

template <class T>
Banded<T> make_banded(Arena& arena, int64_t rows, int64_t values, int32_t** begin, int32_t** offset, T** value) {
  *begin = arena.take<int32_t>(rows);
  *offset = arena.take<int32_t>(rows + 1);
  *value = arena.take<T>(values);
  (*offset)[0] = 0;
  return Banded<T>{static_cast<int32_t>(rows), *begin, *offset, *value};
}

template <class T>
Axis<T> store_axis(Arena& arena, const AxisBuilder& built) {
  Axis<T> axis;
  axis.count = static_cast<int32_t>(built.cells.size());
  auto* cell = arena.take<int32_t>(axis.count);
  std::copy(built.cells.begin(), built.cells.end(), cell);
  axis.cell = cell;

  int32_t *begin, *offset;
  T* value;
  const auto bins = static_cast<int64_t>(built.begin.size());
  const auto values = static_cast<int64_t>(built.weight.size());
  axis.pool = make_banded<T>(arena, bins, values, &begin, &offset, &value);
  std::copy(built.begin.begin(), built.begin.end(), begin);
  std::copy(built.offset.begin(), built.offset.end(), offset);
  for (int64_t i = 0; i < values; ++i) value[i] = static_cast<T>(built.weight[i]);

  axis.spread = make_banded<T>(arena, axis.count, values, &begin, &offset, &value);
  for (int32_t t = 0, at = 0; t < axis.count; ++t) {
    begin[t] = built.bin_begin[t];
    for (int32_t bin = built.bin_begin[t]; bin < built.bin_end[t]; ++bin) {
      value[at++] = static_cast<T>(built.weight[built.offset[bin] + t - built.begin[bin]]);
    }
    offset[t + 1] = at;
  }
  return axis;
}

template <class T>
Banded<T> store_gram(Arena& arena, const AxisBuilder& built, double factor) {
  const auto count = static_cast<int32_t>(built.cells.size());
  int32_t *begin, *offset;
  T* value;
  Banded<T> gram = make_banded<T>(arena, count, built.gram_values, &begin, &offset, &value);
  for (int32_t t = 0, at = 0; t < count; ++t) {
    begin[t] = built.gram_begin[t];
    for (int32_t u = built.gram_begin[t]; u < built.gram_end[t]; ++u) {
      double sum = 0.0;
      for (int32_t bin = built.bin_begin[t]; bin < built.bin_end[t]; ++bin) {
        if (u < built.begin[bin] || u >= built.end[bin]) continue;
        const double* row = built.weight.data() + built.offset[bin] - built.begin[bin];
        sum += row[t] * row[u];
      }
      value[at++] = static_cast<T>(factor * sum);
    }
    offset[t + 1] = at;
  }
  return gram;
}

// Vector multiply-adds plus stores of the two forms; the Gram form's intermediate must also stay in cache.
bool gram_is_cheaper(const AxisBuilder& y, const AxisBuilder& x, int64_t bins_y, int64_t bins_x) {
  const auto rows = static_cast<int64_t>(y.cells.size()), columns = static_cast<int64_t>(x.cells.size());
  const auto pool_y = static_cast<int64_t>(y.weight.size()), pool_x = static_cast<int64_t>(x.weight.size());
  const int64_t gram = rows * x.gram_values + columns * y.gram_values + 2 * rows * columns;
  const int64_t factors = 2 * (rows * pool_x + bins_x * pool_y) + 2 * rows * bins_x + bins_y * bins_x + rows * columns;
  return gram < factors && rows * columns <= 1024;
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

template <class U>
const U* store_all(Arena& arena, const std::vector<U>& values) {
  U* stored = arena.take<U>(static_cast<int64_t>(values.size()));
  std::copy(values.begin(), values.end(), stored);
  return stored;
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
  std::vector<Segment> segments;
  std::vector<size_t> first_segment(rows.size() + 1, 0);
  for (size_t r = 0; r < rows.size(); ++r) {
    first_segment[r] = segments.size();
    for (const auto& [begin, end] : rows[r]) {
      segments.push_back(Segment{top + static_cast<int64_t>(r), begin, end, plan.pixels});
      plan.pixels += end - begin;
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
  plan.segments = store_all(plan.arena, segments);
  plan.segment_count = static_cast<int64_t>(segments.size());
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
    y.build(axis_samples(box[2], box[4], request.stride, request.bins_y, request.sampling_ratio), request.bins_y,
            request.height);
    x.build(axis_samples(box[1], box[3], request.stride, request.bins_x, request.sampling_ratio), request.bins_x,
            request.width);
    if (y.cells.empty() || x.cells.empty()) {  // outside along one axis: nothing along the other either
      y.clear(request.bins_y);
      x.clear(request.bins_x);
    }
    Patch<T> patch{};
    patch.box = k;
    patch.scale = scale;
    patch.y = store_axis<T>(plan.arena, y);
    patch.x = store_axis<T>(plan.arena, x);
    patch.use_gram = request.quadratic && gram_is_cheaper(y, x, request.bins_y, request.bins_x);
    int64_t intermediate = static_cast<int64_t>(patch.y.count) * request.bins_x;
    if (patch.use_gram) {
      patch.y.gram = store_gram<T>(plan.arena, y, 2.0 * scale);
      patch.x.gram = store_gram<T>(plan.arena, x, 1.0);
      intermediate = std::max(intermediate, static_cast<int64_t>(patch.y.count) * patch.x.count);
    }
    plan.intermediate = std::max(plan.intermediate, intermediate);
    patches.push_back(patch);
  }
  place_patches(plan, patches);
  plan.patches = store_all(plan.arena, patches);
  plan.patch_count = static_cast<int64_t>(patches.size());
  return plan;
}

template Plan<float> build_plan<float>(const PlanRequest&);
template Plan<double> build_plan<double>(const PlanRequest&);

}  // namespace rakd
