// Chooses the boxes for the Gram operator by a cost model, and assembles it from their sampling tables.
#include "gram_operator.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "box_plan.h"
#include "kernels.h"

namespace rakd {
namespace {

constexpr int kHalf = GramOperator<float>::kHalf, kRadius = GramOperator<float>::kRadius;

// How many cells apart two cells of one bin are at most.
template <class T>
int reach(const Axis<T>& axis) {
  int most = 0;
  for (int32_t bin = 0; bin < axis.bins; ++bin) {
    const int32_t cells = axis.offset[bin + 1] - axis.offset[bin];
    const int32_t* first = axis.cell + axis.begin[bin];
    if (cells > 1) most = std::max(most, first[cells - 1] - first[0]);
  }
  return most;
}

// Estimated clock cycles of the patch's own passes for a block of channels: 13 for four cells of a row, bound by loads
// and stores, and 15 for a bin; the loss alone takes about two fifths. The algorithms differ by multiples, so that
// rough numbers are enough. To check them, let choose_algorithm() return false and compare the benchmark's workloads
// train (7 bins) and train19.
template <class T>
double factor_cost(const Patch<T>& patch, bool gradients) {
  const double taps = static_cast<double>(patch.y.count) * patch.x.offset[patch.x.bins];
  const double bins = static_cast<double>(patch.y.bins) * patch.x.bins;
  return (3.2 * taps + 15.0 * bins) * (gradients ? 1.0 : 0.4);
}

// Estimated clock cycles of the operator for a block of channels, for one cell of one cell's window.
constexpr double kCellOfWindow = 0.8;

// G = R^T R along one axis, by distance on the map: value[(cell - first) * kHalf + distance], distances 0 to kRadius.
template <class T>
void fill_band(const Axis<T>& axis, double factor, std::vector<T>& value) {
  value.assign(static_cast<size_t>(axis.cell[axis.count - 1] - axis.cell[0] + 1) * kHalf, T(0));
  for (int32_t bin = 0; bin < axis.bins; ++bin) {
    const int32_t cells = axis.offset[bin + 1] - axis.offset[bin];
    const T* weight = axis.weight + axis.offset[bin];
    const int32_t* cell = axis.cell + axis.begin[bin];
    for (int32_t a = 0; a < cells; ++a) {
      T* row = value.data() + static_cast<int64_t>(cell[a] - axis.cell[0]) * kHalf;
      for (int32_t b = a; b < cells; ++b) {
        row[cell[b] - cell[a]] += static_cast<T>(factor * weight[a] * weight[b]);
      }
    }
  }
}

template <class T>
class Assembler {
 public:
  explicit Assembler(Plan<T>& plan) : plan_(plan) {}

  void add(const Patch<T>& patch) {
    fill_band(patch.x, 1.0, band_x_);
    fill_band(patch.y, 2.0 * patch.scale, band_y_);
    const auto values = static_cast<int64_t>(band_x_.size());
    for (int32_t i = 0; i < patch.y.count; ++i) {
      const T* row = band_y_.data() + static_cast<int64_t>(patch.y.cell[i] - patch.y.cell[0]) * kHalf;
      for (int below = 0; below <= plan_.gram.radius_y; ++below) {
        const T factor = row[below];
        if (factor == T(0)) continue;
        const int64_t first = patch.row_base[i] + patch.x.cell[0];
        add_scaled_(factor, band_x_.data(), values, plan_.gram.weight + below * plan_.gram.plane + first * kHalf);
      }
    }
  }

  // Cuts segments into runs, over each of which the same segments of other rows lie above and below.
  void link_runs() {
    const SegmentsOfRows of_rows(plan_.segments, plan_.segment_count);
    const int radius = plan_.gram.radius_y;
    std::vector<int64_t> cuts;
    for (int64_t n = 0; n < plan_.segment_count; ++n) {
      const Segment& s = plan_.segments[n];
      cuts = {s.begin, s.end};
      const int64_t first = of_rows.begin(s.row - radius), last = of_rows.end(s.row + radius);
      for (int64_t m = first; m < last; ++m) {
        for (const int64_t x : {plan_.segments[m].begin, plan_.segments[m].end}) {
          if (x > s.begin && x < s.end) cuts.push_back(x);
        }
      }
      for (int64_t x = s.begin + kMaxRun; x < s.end; x += kMaxRun) cuts.push_back(x);
      std::sort(cuts.begin(), cuts.end());
      for (size_t c = 0; c + 1 < cuts.size(); ++c) {
        if (cuts[c] == cuts[c + 1]) continue;
        const int64_t from = cuts[c] - s.begin;
        GramRun run{s.offset + from,
                    cuts[c + 1] - cuts[c],
                    s.row * plan_.width + cuts[c],
                    s.gradient < 0 ? -1 : s.gradient + from,
                    static_cast<int32_t>(rows_.size()),
                    0};
        for (int64_t m = first; m < last; ++m) {
          const Segment& other = plan_.segments[m];
          if (other.begin > cuts[c] || other.end <= cuts[c]) continue;
          add_row(run, static_cast<int>(other.row - s.row), other.offset + cuts[c] - other.begin - run.first);
        }
        run.row_end = static_cast<int32_t>(rows_.size());
        runs_.push_back(run);
      }
    }
    plan_.gram.runs = plan_.arena.template copy<GramRun>(runs_.data(), static_cast<int64_t>(runs_.size()));
    plan_.gram.run_count = static_cast<int64_t>(runs_.size());
    plan_.gram.rows = plan_.arena.template copy<GramRow>(rows_.data(), static_cast<int64_t>(rows_.size()));
  }

 private:
  static constexpr int64_t kMaxRun = 64;

  // The row of cells `distance` rows below the run (above if negative), if anything couples the two. Weights lie with
  // the upper cell, here and there alike.
  void add_row(const GramRun& run, int distance, int64_t shift) {
    const int64_t at = std::abs(distance) * plan_.gram.plane + (distance < 0 ? shift : 0) * kHalf;
    const T* weight = plan_.gram.weight + at + run.first * kHalf;
    T used[kHalf] = {};  // sums of magnitudes
    for (const T* w = weight - kRadius * kHalf; w != weight + run.count * kHalf; w += kHalf) {
      for (int dx = 0; dx < kHalf; ++dx) used[dx] += std::fabs(w[dx]);
    }
    int32_t radius = kRadius;
    while (radius > 0 && used[radius] == T(0)) --radius;
    if (used[radius] != T(0)) rows_.push_back({shift, at, radius});
  }

  Plan<T>& plan_;
  const decltype(Kernels<T>::add_scaled) add_scaled_ = best_kernels<T>().add_scaled;
  std::vector<T> band_x_, band_y_;
  std::vector<GramRun> runs_;
  std::vector<GramRow> rows_;
};

}  // namespace

template <class T>
bool choose_algorithm(Plan<T>& plan, Patch<T>* patches, int64_t channel_blocks, bool gradients) {
  struct Reach {
    int y, x;
    int most() const { return std::max(y, x); }
  };
  std::vector<Reach> reaches(plan.patch_count);
  double factors = 0.0, assembly = 0.0;
  for (int64_t n = 0; n < plan.patch_count; ++n) {
    const Patch<T>& patch = patches[n];
    reaches[n] = {reach(patch.y), reach(patch.x)};
    factors += factor_cost(patch, gradients);
  }
  // Far-reaching patches widen the windows of all the cells they cover, so they join last, if at all.
  std::vector<uint8_t> window(plan.cells, 0);  // cells of the largest window at each
  double least = factors * channel_blocks;
  int limit = -1;
  for (int most = 0; most <= kRadius; ++most) {
    for (int64_t n = 0; n < plan.patch_count; ++n) {
      const Patch<T>& patch = patches[n];
      if (reaches[n].most() != most || patch.x.count == 0) continue;
      factors -= factor_cost(patch, gradients);
      const int32_t left = patch.x.cell[0], width = patch.x.cell[patch.x.count - 1] + 1 - left;
      assembly += 3.0 * patch.y.count * width;  // up to five rows of five weights, in vectors
      const auto cells = static_cast<uint8_t>((2 * reaches[n].y + 1) * (2 * reaches[n].x + 1));
      for (int32_t i = 0; i < patch.y.count; ++i) {
        uint8_t* row = window.data() + patch.row_base[i] + left;
        for (int32_t x = 0; x < width; ++x) row[x] = std::max(row[x], cells);
      }
    }
    const auto apply = static_cast<double>(std::accumulate(window.begin(), window.end(), int64_t(0)));
    const double cost = (factors + kCellOfWindow * apply) * channel_blocks + assembly;
    if (cost < least) least = cost, limit = most;
  }
  for (int64_t n = 0; n < plan.patch_count; ++n) {
    patches[n].assembled = reaches[n].most() <= limit && patches[n].x.count > 0;
    if (patches[n].assembled) plan.gram.radius_y = std::max(plan.gram.radius_y, reaches[n].y);
  }
  return limit >= 0;
}

template <class T>
void assemble_operator(Plan<T>& plan, const Patch<T>* patches) {
  plan.gram.plane = (plan.cells + 2 * kGap) * kHalf;
  const int64_t values = plan.gram.plane * (plan.gram.radius_y + 1);
  T* memory = plan.arena.template take<T>(values);
  std::memset(memory, 0, values * sizeof(T));
  plan.gram.weight = memory + kGap * kHalf;
  Assembler<T> assembler(plan);
  for (int64_t n = 0; n < plan.patch_count; ++n) {
    if (patches[n].assembled) assembler.add(patches[n]);
  }
  assembler.link_runs();
}

template bool choose_algorithm<float>(Plan<float>&, Patch<float>*, int64_t, bool);
template bool choose_algorithm<double>(Plan<double>&, Patch<double>*, int64_t, bool);
template void assemble_operator<float>(Plan<float>&, const Patch<float>*);
template void assemble_operator<double>(Plan<double>&, const Patch<double>*);

}  // namespace rakd
