// The CPU kernels. Compiled once per instruction set, with RAKD_ISA naming its namespace and the compiler's flags
// choosing the registers; dispatch.cpp picks one at run time. See kernels.h for what may be included here.
#include "kernels.h"

#include "stream.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if !defined(RAKD_ISA) || !defined(RAKD_VECTOR_BYTES)
#error "setup.py defines RAKD_ISA and RAKD_VECTOR_BYTES for each instruction set"
#endif

namespace rakd {
namespace RAKD_ISA {
namespace {

template <class T>
T* buffer(void* p) {
  return static_cast<T*>(p);
}

template <class T>
void clear(T* p, int64_t count) {
  __builtin_memset(p, 0, size_t(count) * sizeof(T));
}

#include "simd.h"

#include "gram_operator.h"
#include "moves.h"
#include "passes.h"

inline bool is_finite(double value) { return value - value == 0.0; }

// One side, gradients wanted: from gathered values to the maps' gradients, with scratch for the gradient of all cells.
template <class E, class T, int W>
double distill_values(const DistillTask<T>& task, const ChannelBlock& channels, bool assembled, const T* values,
                      T* gradient, Scratch& scratch) {
  const Plan<T>& plan = *task.plan[0];
  T *sums = buffer<T>(scratch.sums[0]), *spread_sums = buffer<T>(scratch.sums[1]);
  const auto put = [&](const GramRun&, int64_t u, const T* value) { Block<T, W>::load(value).store(gradient + u * W); };
  double total = assembled ? 0.5 * apply_operator<T, W>(plan.gram, values, put) : 0.0;
  // The operator's windows have cells of weight zero that the patches do not touch: infinities there would spread.
  if (assembled && !is_finite(total)) {
    assembled = false;
    total = 0.0;
  }
  if (!assembled) clear(gradient, plan.pixels * W);
  for (int64_t n = 0; n < plan.patch_count; ++n) {
    const Patch<T>& patch = plan.patches[n];
    if (assembled && patch.assembled) continue;
    total += patch.scale *
             pool_and_spread<T, W>(patch, T(2.0 * patch.scale), values, sums, spread_sums, patch.row_base, gradient);
  }
  for (int side = 0; side < 2; ++side) {
    if (task.gradient[side].data) {
      scatter<E, T, W>(plan, gradient, side == 0 ? T(1) : T(-1), channels, task.gradient[side]);
    }
  }
  return total;
}

template <class E, class T, int W>
void distill_shared_gradient(DistillTask<T>& task, Scratch& scratch) {
  T *values = buffer<T>(scratch.values[0]), *gradient = buffer<T>(scratch.gradients[0]);
  gather<E, T, W>(*task.plan[0], task.map[0], task.map[1], task.channels, values);
  task.total =
      distill_values<E, T, W>(task, task.channels, task.plan[0]->gram.weight != nullptr, values, gradient, scratch);
}

// The same for channels-last maps in wide blocks, with compact scratch for the gradient: where the operator stands for
// all patches it writes to the maps.
template <class E, class T, int W>
void distill_wide(DistillTask<T>& task, Scratch& scratch) {
  const Plan<T>& plan = *task.plan[0];
  T *values = buffer<T>(scratch.values[0]), *gradient = buffer<T>(scratch.gradients[0]);
  T *sums = buffer<T>(scratch.sums[0]), *spread_sums = buffer<T>(scratch.sums[1]);
  gather<E, T, W>(plan, task.map[0], task.map[1], task.channels, values);
  const int first = task.gradient[0].data ? 0 : 1, last = task.gradient[1].data ? 1 : 0;
  const PixelWriter<E, T, W> writer(task.gradient[first], task.channels), other(task.gradient[last], task.channels);
  const T sign = first == 0 ? T(1) : T(-1);
  const bool both = first != last;
  const auto write = [&](int64_t cell, const T* value) {
    writer.put(cell, value, sign);
    if (both) other.put(cell, value, T(-1));
  };
  const auto put = [&](const GramRun& run, int64_t u, const T* value) {
    const int64_t at = u - run.first;
    run.gradient < 0 ? write(run.cell + at, value) : Block<T, W>::load(value).store(gradient + (run.gradient + at) * W);
  };
  const bool assembled = plan.gram.weight != nullptr;
  task.total = assembled ? 0.5 * apply_operator<T, W>(plan.gram, values, put) : 0.0;
  if (is_finite(task.total)) {
    if (!assembled) clear(gradient, plan.gradient_pixels * W);
    for (int64_t n = 0; n < plan.patch_count; ++n) {
      const Patch<T>& patch = plan.patches[n];
      if (patch.assembled) continue;
      task.total += patch.scale * pool_and_spread<T, W>(patch, T(2.0 * patch.scale), values, sums, spread_sums,
                                                        patch.gradient_base, gradient);
    }
    for (int64_t n = 0; n < plan.segment_count; ++n) {
      const Segment& s = plan.segments[n];
      if (s.gradient < 0) continue;
      const T* from = gradient + s.gradient * W;
      for (int64_t x = s.begin; x < s.end; ++x, from += W) write(s.row * plan.width + x, from);
    }
  } else {
    // Patch by patch (see above), in half as wide blocks, whose values and gradient have room in the values' scratch.
    task.total = 0.0;
    for (int64_t c = 0; c < task.channels.count; c += W / 2) {
      const int64_t left = task.channels.count - c;
      const ChannelBlock half{task.channels.begin + c, left < W / 2 ? left : W / 2, W / 2};
      gather<E, T, W / 2>(plan, task.map[0], task.map[1], half, values);
      T* half_gradient = values + (plan.pixels + kSlack) * (W / 2);
      task.total += distill_values<E, T, W / 2>(task, half, false, values, half_gradient, scratch);
    }
  }
  finish_streams();
}

// One side, the loss alone.
template <class E, class T, int W>
void distill_shared_loss(DistillTask<T>& task, Scratch& scratch) {
  const Plan<T>& plan = *task.plan[0];
  T *values = buffer<T>(scratch.values[0]), *sums = buffer<T>(scratch.sums[0]);
  gather<E, T, W>(plan, task.map[0], task.map[1], task.channels, values);
  const auto drop = [](const GramRun&, int64_t, const T*) {};
  bool assembled = plan.gram.weight != nullptr;
  task.total = assembled ? 0.5 * apply_operator<T, W>(plan.gram, values, drop) : 0.0;
  if (!is_finite(task.total)) {  // see distill_values
    assembled = false;
    task.total = 0.0;
  }
  for (int64_t n = 0; n < plan.patch_count; ++n) {
    const Patch<T>& patch = plan.patches[n];
    if (!assembled || !patch.assembled) task.total += patch.scale * pool_squares<T, W>(patch, values, sums);
  }
}

// Pooled differences themselves: for losses per box, and for maps that differ in shape.
template <class E, class T, int W>
void distill_pooled(DistillTask<T>& task, Scratch& scratch) {
  const int sides = task.plan[1] ? 2 : 1;
  T *values[2], *gradients[2], *pooled[2], *sums = buffer<T>(scratch.sums[0]);
  for (int side = 0; side < 2; ++side) {
    values[side] = buffer<T>(scratch.values[side]);
    gradients[side] = buffer<T>(scratch.gradients[side]);
    pooled[side] = buffer<T>(scratch.pooled[side]);
  }
  if (sides == 1) {
    gather<E, T, W>(*task.plan[0], task.map[0], task.map[1], task.channels, values[0]);
  } else {
    for (int side = 0; side < 2; ++side) {
      gather<E, T, W>(*task.plan[side], task.map[side], ImageView{}, task.channels, values[side]);
      if (task.gradient[side].data) clear(gradients[side], task.plan[side]->pixels * W);
    }
  }
  task.total = 0.0;
  const int64_t bins = task.bins_y * task.bins_x;
  for (int64_t n = 0; n < task.plan[0]->patch_count; ++n) {
    const Patch<T>& patch = task.plan[0]->patches[n];
    pool<T, W>(patch, values[0], sums, pooled[0]);
    if (sides == 2) {
      pool<T, W>(task.plan[1]->patches[n], values[1], sums, pooled[1]);
      for (int64_t i = 0; i < bins * W; ++i) pooled[0][i] -= pooled[1][i];
    }
    const double loss = patch.scale * inner_product<T, W>(pooled[0], pooled[0], bins);
    if (task.patch_losses) task.patch_losses[n] = loss;
    task.total += loss;
    for (int side = 0; side < sides; ++side) {
      if (!task.gradient[side].data) continue;
      const T factor = T((side == 0 ? 2.0 : -2.0) * patch.scale);
      spread<T, W>(task.plan[side]->patches[n], factor, pooled[0], sums, gradients[side]);
    }
  }
  for (int side = 0; side < sides; ++side) {
    if (!task.gradient[side].data) continue;
    scatter<E, T, W>(*task.plan[side], gradients[side], T(1), task.channels, task.gradient[side]);
  }
}

template <class E, class T, int W>
struct Distill {
  static constexpr bool kWide = true;  // for maps that share a shape, unless the losses of the boxes are wanted
  static void run(DistillTask<T>& task, Scratch& scratch) {
    const bool gradients = task.gradient[0].data || task.gradient[1].data;
    if (task.plan[1] || task.patch_losses) {
      if constexpr (W != kWideBlock) distill_pooled<E, T, W>(task, scratch);
    } else if (!gradients) {
      distill_shared_loss<E, T, W>(task, scratch);
    } else if constexpr (W == kWideBlock) {
      distill_wide<E, T, W>(task, scratch);
    } else {
      distill_shared_gradient<E, T, W>(task, scratch);
    }
  }
};

template <class E, class T, int W>
struct Align {
  static constexpr bool kWide = false;
  static void run(const AlignTask<T>& task, Scratch& scratch) {
    T *sums = buffer<T>(scratch.sums[0]), *pooled = buffer<T>(scratch.pooled[0]), *sum = buffer<T>(scratch.pooled[1]);
    const int64_t bins = task.bins_y * task.bins_x;
    T* values = buffer<T>(scratch.values[0]);
    for (int64_t l = 0; l < task.levels; ++l) {
      gather<E, T, W>(*task.plans[l], task.maps[l], ImageView{}, task.channels, values);
      values += (task.plans[l]->pixels + kSlack) * W;
    }
    int64_t next[kMaxLevels] = {};  // first patch of each level that is not done; they come in the boxes' order
    for (int64_t n = 0; n < task.box_count; ++n) {
      const int64_t box = task.boxes[n];
      clear(sum, bins * W);
      values = buffer<T>(scratch.values[0]);
      for (int64_t l = 0; l < task.levels; ++l) {
        const Plan<T>& plan = *task.plans[l];
        if (next[l] < plan.patch_count && plan.patches[next[l]].box == box) {
          const Patch<T>& patch = plan.patches[next[l]++];
          pool<T, W>(patch, values, sums, pooled);
          const T scale = T(patch.scale);
          for (int64_t i = 0; i < bins * W; ++i) sum[i] += scale * pooled[i];
        }
        values += (plan.pixels + kSlack) * W;
      }
      E* out = static_cast<E*>(task.output) + (box * task.total_channels + task.channels.begin) * bins;
      scatter_run<E, T, W>(sum, T(1), bins, bins, task.channels.count, out, bins);
    }
  }
};

template <class E, class T, int W>
struct AlignBackward {
  static constexpr bool kWide = false;
  static void run(const AlignBackwardTask<T>& task, Scratch& scratch) {
    const Plan<T>& plan = *task.plan;
    T *gradient = buffer<T>(scratch.gradients[0]), *sums = buffer<T>(scratch.sums[0]);
    T* pooled = buffer<T>(scratch.pooled[0]);
    const int64_t bins = task.bins_y * task.bins_x;
    ImageView view;
    view.channel_stride = bins;
    view.column_stride = 1;
    clear(gradient, plan.pixels * W);
    for (int64_t n = 0; n < plan.patch_count; ++n) {
      const Patch<T>& patch = plan.patches[n];
      const E* in =
          static_cast<const E*>(task.output_gradient) + (patch.box * task.total_channels + task.channels.begin) * bins;
      gather_run<Gather::kCopy, E, T, W>(in, view, nullptr, view, bins, bins, task.channels.count, pooled);
      spread<T, W>(patch, T(patch.scale), pooled, sums, gradient);
    }
    scatter<E, T, W>(plan, gradient, T(1), task.channels, task.gradient);
  }
};

template <template <class, class, int> class Kernel, class E, class T, class Task>
void run_width(Task& task, Scratch& scratch) {
  if constexpr (Kernel<E, T, 8>::kWide && sizeof(T) == sizeof(float)) {
    if (task.channels.width == kWideBlock) return Kernel<E, T, int(kWideBlock)>::run(task, scratch);
  }
  task.channels.width == 8 ? Kernel<E, T, 8>::run(task, scratch) : Kernel<E, T, 16>::run(task, scratch);
}

template <template <class, class, int> class Kernel, class Task>
void run_float(Task& task, Element element, Scratch& scratch) {
  if (element == Element::kHalf) return run_width<Kernel, HalfBits, float>(task, scratch);
  if (element == Element::kBFloat16) return run_width<Kernel, BFloat16Bits, float>(task, scratch);
  return run_width<Kernel, float, float>(task, scratch);
}

template <template <class, class, int> class Kernel, class Task>
void run_double(Task& task, Element, Scratch& scratch) {
  run_width<Kernel, double, double>(task, scratch);
}

template <class T>
void add_scaled(T factor, const T* __restrict from, int64_t count, T* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = {
      run_float<Distill, DistillTask<float>>,
      run_double<Distill, DistillTask<double>>,
      run_float<Align, const AlignTask<float>>,
      run_double<Align, const AlignTask<double>>,
      run_float<AlignBackward, const AlignBackwardTask<float>>,
      run_double<AlignBackward, const AlignBackwardTask<double>>,
      add_scaled<float>,
      add_scaled<double>,
  };
  return table;
}

}  // namespace RAKD_ISA
}  // namespace rakd
