// Builds the plans of plan.h: sampling tables per box and axis, and the union of the touched cells.
#include "plan.h"

#include <algorithm>

namespace rakd {
namespace {

// Table of one axis in double, before it is narrowed and stored; buffers are reused from box to box.
class AxisBuilder {
 public:
  void build(const AxisSamples& samples, int64_t bins, int64_t size, int64_t sampling_ratio) {
    const AxisCapacity capacity = axis_capacity(size, bins, sampling_ratio);
    for (auto* array : {&cell_, &cell_bin_, &cell_offset_, &gram_begin_, &gram_end_}) grow(*array, capacity.cells + 1);
    for (auto* array : {&bin_cell_, &bin_offset_, &bin_new_}) grow(*array, bins + 1);
    for (auto* array : {&pool_, &spread_}) grow(*array, capacity.weights);
    table = AxisTable<double>{&count,          cell_.data(), cell_bin_.data(), bin_cell_.data(), bin_offset_.data(),
                              bin_new_.data(), pool_.data()};
    this->bins = static_cast<int32_t>(bins);
    for (int32_t bin = 0; bin < this->bins; ++bin) count_cells(samples, size, bin, table);
    link_bins(size, this->bins, table);
    for (int32_t bin = 0; bin < this->bins; ++bin) fill_bin(samples, size, bin, table);
    transpose();
    measure_gram();
  }
  void clear() { build(AxisSamples{0.0, 0.0, 0}, bins, 1, 1); }

  // Touched cells that share a bin with touched cell t: gram_begin(t) .. gram_end(t).
  int32_t gram_begin(int32_t t) const { return gram_begin_[t]; }
  int32_t gram_end(int32_t t) const { return gram_end_[t]; }
  int64_t pool_values() const { return table.bin_offset[bins]; }

  // R transposed: the bins of touched cell t follow on its first one; their weights begin at cell_offset()[t].
  const int32_t* cell_offset() const { return cell_offset_.data(); }
  const double* spread() const { return spread_.data(); }

  AxisTable<double> table{};
  int32_t count = 0, bins = 0;
  int64_t gram_values = 0;

 private:
  template <class U>
  static void grow(std::vector<U>& array, int64_t count) {
    if (static_cast<int64_t>(array.size()) < count) array.resize(count);
  }

  void transpose() {
    int32_t offset = 0;
    for (int32_t t = 0; t < count; ++t) {
      cell_offset_[t] = offset;
      for (int32_t bin = table.cell_bin[t]; bin < bins && table.bin_cell[bin] <= t; ++bin) {
        spread_[offset++] = table.weight(bin, t);
      }
    }
    cell_offset_[count] = offset;
  }

  void measure_gram() {
    gram_values = 0;
    for (int32_t t = 0; t < count; ++t) {
      const int32_t first = table.cell_bin[t], last = first + cell_offset_[t + 1] - cell_offset_[t] - 1;
      gram_begin_[t] = table.bin_cell[first];
      gram_end_[t] = t + 1;
      for (int32_t bin = first; bin <= last; ++bin) {
        gram_end_[t] = std::max(gram_end_[t], table.bin_cell[bin] + table.bin_offset[bin + 1] - table.bin_offset[bin]);
      }
      gram_values += gram_end_[t] - gram_begin_[t];
    }
  }

  std::vector<int32_t> cell_, cell_bin_, cell_offset_, bin_cell_, bin_offset_, bin_new_, gram_begin_, gram_end_;
  std::vector<double> pool_, spread_;
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
  axis.count = built.count;
  auto* cell = arena.take<int32_t>(axis.count);
  std::copy_n(built.table.cell, axis.count, cell);
  axis.cell = cell;

  int32_t *begin, *offset;
  T* value;
  const int64_t values = built.pool_values();
  axis.pool = make_banded<T>(arena, built.bins, values, &begin, &offset, &value);
  std::copy_n(built.table.bin_cell, built.bins, begin);
  std::copy_n(built.table.bin_offset, built.bins + 1, offset);
  std::copy_n(built.table.pool, values, value);

  const int64_t spread_values = built.cell_offset()[axis.count];
  axis.spread = make_banded<T>(arena, axis.count, spread_values, &begin, &offset, &value);
  std::copy_n(built.table.cell_bin, axis.count, begin);
  std::copy_n(built.cell_offset(), axis.count + 1, offset);
  std::copy_n(built.spread(), spread_values, value);
  return axis;
}

template <class T>
Banded<T> store_gram(Arena& arena, const AxisBuilder& built, double factor) {
  const AxisTable<double>& table = built.table;
  int32_t *begin, *offset;
  T* value;
  Banded<T> gram = make_banded<T>(arena, built.count, built.gram_values, &begin, &offset, &value);
  for (int32_t t = 0, at = 0; t < built.count; ++t) {
    begin[t] = built.gram_begin(t);
    const int32_t first = table.cell_bin[t], last = first + built.cell_offset()[t + 1] - built.cell_offset()[t];
    for (int32_t u = built.gram_begin(t); u < built.gram_end(t); ++u) {
      double sum = 0.0;
      for (int32_t bin = first; bin < last; ++bin) {
        const int32_t from = table.bin_cell[bin], count = table.bin_offset[bin + 1] - table.bin_offset[bin];
        if (u < from || u >= from + count) continue;
        const double* row = table.pool + table.bin_offset[bin] - from;
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
  const int64_t rows = y.count, columns = x.count, pool_y = y.pool_values(), pool_x = x.pool_values();
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
