// RoIAlign sampling geometry and level weights: the one place where they are defined for compiled code.
//
// Shared by the CPU library and by device code, so nothing here allocates, throws or includes torch. All of it
// is in double whatever the maps' dtype: a float32 tap position is off by up to 1e-4 of a cell on wide maps,
// which is more than the 1e-5 the ops promise. The products and sums are never contracted into fused
// multiply-adds, because the reference (rakd_ops/reference.py) rounds after each operation and a last-bit
// difference at the border of a map (a sample counts at y = -1 and not just below) would be a visible one.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define RAKD_HD __host__ __device__ inline
#else
#define RAKD_HD inline
#endif

namespace rakd {

// More pyramid levels than any detector has; the ops refuse more.
constexpr int kMaxLevels = 16;

#if defined(__CUDA_ARCH__)
RAKD_HD double mul(double a, double b) { return __dmul_rn(a, b); }
RAKD_HD double add(double a, double b) { return __dadd_rn(a, b); }
#else
// Compiled with -ffp-contract=off (setup.py), so a plain product is rounded here as well.
RAKD_HD double mul(double a, double b) { return a * b; }
RAKD_HD double add(double a, double b) { return a + b; }
#endif

// The samples of one box along one axis: bin p, sample i lies at start + p * bin + (i + 0.5) * bin / samples.
struct AxisSamples {
  double start;     // cells, RoIAlign's aligned=True convention (half a cell already taken off)
  double bin;       // cells per output bin
  int64_t samples;  // per bin; 0 when the sampling is adaptive and the box has no extent
  // [samples] sample_offset() of each, where the caller keeps them: they are the same in all bins.
  const double* offset = nullptr;
};

// Two taps of one sample. A sample outside the map has valid == false and no taps.
struct Tap {
  bool valid;
  int64_t low, high;
  double weight_low, weight_high;
};

// Larger counts cannot be looped over; they only arise from adaptive sampling of absurd boxes, whose samples
// the callers skip by visiting the range that can touch the map.
constexpr double kMaxSamples = 9.0e15;

RAKD_HD AxisSamples axis_samples(double low, double high, double stride, int64_t bins, int64_t sampling_ratio) {
  const double scale = 1.0 / stride;
  AxisSamples axis;
  axis.start = add(mul(low, scale), -0.5);
  const double size = add(add(mul(high, scale), -0.5), -axis.start);
  axis.bin = size / static_cast<double>(bins);
  if (sampling_ratio > 0) {
    axis.samples = sampling_ratio;
  } else {
    const double count = ceil(axis.bin);
    // Written so that NaN gives no samples.
    axis.samples = !(count > 0.0) ? 0 : count < kMaxSamples ? static_cast<int64_t>(count) : int64_t(kMaxSamples);
  }
  return axis;
}

// From the start of a bin, in cells.
RAKD_HD double sample_offset(const AxisSamples& axis, int64_t sample) {
  return mul(static_cast<double>(sample) + 0.5, axis.bin) / static_cast<double>(axis.samples);
}

RAKD_HD double sample_position(const AxisSamples& axis, int64_t bin, int64_t sample) {
  const double bin_start = add(axis.start, mul(static_cast<double>(bin), axis.bin));
  return add(bin_start, axis.offset ? axis.offset[sample] : sample_offset(axis, sample));
}

// Bilinear taps of a position on a map axis of `size` cells (torchvision.ops.roi_align's border rule).
RAKD_HD Tap bilinear_tap(double position, int64_t size) {
  Tap tap{false, 0, 0, 0.0, 0.0};
  // Written so that NaN is outside.
  if (!(position >= -1.0 && position <= static_cast<double>(size))) return tap;
  tap.valid = true;
  if (position < 0.0) position = 0.0;
  tap.low = static_cast<int64_t>(position);
  if (tap.low >= size - 1) {
    tap.low = tap.high = size - 1;
    tap.weight_low = 1.0;
    return tap;
  }
  tap.high = tap.low + 1;
  tap.weight_high = position - static_cast<double>(tap.low);
  tap.weight_low = 1.0 - tap.weight_high;
  return tap;
}

// First sample of `bin` that can touch the map, and one past the last. Conservative by a few samples on each
// side, and by those that rounding may bring onto the map; bilinear_tap decides. Keeps the work bounded by the map for
// adaptive sampling of huge boxes.
RAKD_HD void sample_range(const AxisSamples& axis, int64_t bin, int64_t size, int64_t* first, int64_t* last) {
  *first = 0;
  *last = axis.samples;
  const double spacing = axis.bin / static_cast<double>(axis.samples);
  if (axis.samples < 64 || !(spacing > 0.0)) return;
  const double bin_start = add(axis.start, mul(static_cast<double>(bin), axis.bin));
  const double count = static_cast<double>(axis.samples);
  double spare = 4.0 + 1e-15 * (fabs(bin_start) + static_cast<double>(size)) / spacing;
  if (!(spare < count)) spare = count;  // finite: an infinite one could make low or high NaN
  const double low = (-1.0 - bin_start) / spacing - spare;
  const double high = (static_cast<double>(size) - bin_start) / spacing + spare;
  *first = static_cast<int64_t>(low < 0.0 ? 0.0 : low > count ? count : low);
  *last = static_cast<int64_t>(high < 0.0 ? 0.0 : high > count ? count : high);
}

enum class Assignment : int64_t { kSoft = 0, kHard = 1, kUniform = 2 };

// The level rule: how the levels of a box are weighted (FPN equation 1 without the floor, Gaussian over the levels).
struct LevelRule {
  Assignment assignment;
  double sigma;            // in levels
  double canonical_size;   // pixels
  double canonical_level;  // level of a box of canonical_size
};

// Keeps m_k + eps from falling below an integer by rounding alone; torchvision's LevelMapper uses the same.
constexpr double kLevelEpsilon = 1e-6;

// Weights of `count` levels (level_of[l] = log2(stride_l), increasing) for a box of the given sides, in pixels.
// Non-finite or negative sides give finite weights: memory safety is the caller's only other concern.
RAKD_HD void level_weights(double width, double height, const double* level_of, int64_t count, const LevelRule& rule,
                           double* weights) {
  if (rule.assignment == Assignment::kUniform) {
    for (int64_t l = 0; l < count; ++l) weights[l] = 1.0 / static_cast<double>(count);
    return;
  }
  const double area = mul(width, height);
  double level = level_of[0];
  if (area > 0.0) level = add(rule.canonical_level, log2(sqrt(area) / rule.canonical_size));
  if (!(level > level_of[0])) level = level_of[0];
  if (level > level_of[count - 1]) level = level_of[count - 1];

  if (rule.assignment == Assignment::kHard) {
    int64_t chosen = 0;
    for (int64_t l = 1; l < count; ++l) {
      if (level_of[l] <= add(level, kLevelEpsilon)) chosen = l;
    }
    for (int64_t l = 0; l < count; ++l) weights[l] = l == chosen ? 1.0 : 0.0;
    return;
  }
  // Soft. The exponent of the nearest level is taken off all of them, and sigma is divided by twice, so that
  // no sigma, however small, turns this into 0 / 0: it then selects the nearest level.
  double nearest = INFINITY;
  for (int64_t l = 0; l < count; ++l) {
    const double distance = add(level_of[l], -level);
    weights[l] = mul(distance, distance);
    if (weights[l] < nearest) nearest = weights[l];
  }
  double total = 0.0;
  for (int64_t l = 0; l < count; ++l) {
    weights[l] = exp(mul(-0.5, add(weights[l], -nearest)) / rule.sigma / rule.sigma);
    total = add(total, weights[l]);
  }
  for (int64_t l = 0; l < count; ++l) weights[l] /= total;
}

}  // namespace rakd
