// The CPU kernels. Compiled once per instruction set, with RAKD_ISA naming its namespace and the compiler's flags
// choosing the registers; dispatch.cpp picks one at run time. See kernels.h for what may be included here.
#include "kernels.h"

#include <type_traits>
#include <utility>

#include "nontemporal_store.h"

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
void clear(T* p, int64_t count) {
  __builtin_memset(p, 0, size_t(count) * sizeof(T));
}

#include "simd.h"

#include "apply_gram_operator.h"
#include "gather_scatter.h"
#include "separable_roi_align.h"

// One side, gradients wanted: from gathered values [cells][W] to the maps' gradients, with scratch [cells][W] for the
// gradient of all cells.
template <class T, int W>
double distill_values(const DistillTask<T>& task, const ChannelBlock& channels, bool assembled, const T* values,
                      T* gradient, Scratch<T>& scratch) {
  const Plan<T>& plan = *task.plan[0];
  const auto put = [&](const GramRun&, int64_t u, const T* value) { Block<T, W>::load(value).store(gradient + u * W); };
  double total = assembled ? 0.5 * apply_operator<T, W>(plan.gram, values, put) : 0.0;
  // The operator's windows have cells of weight zero that the patches do not touch: infinities there would spread.
  if (assembled && !is_finite_number(total)) {
    assembled = false;
    total = 0.0;
  }
  if (!assembled) clear(gradient, plan.cells * W);
  for (int64_t n = 0; n < plan.patch_count; ++n) {
    const Patch<T>& patch = plan.patches[n];
    if (assembled && patch.assembled) continue;
    total += patch.scale * pool_forward_backward<T, W>(patch, T(2.0 * patch.scale), values, scratch.sums[0],
                                                       scratch.sums[1], patch.row_base, gradient);
  }
  for (int side = 0; side < 2; ++side) {
    if (task.gradient[side].data) {
      scatter<T, W>(plan, gradient, side == 0 ? T(1) : T(-1), channels, task.gradient[side]);
    }
  }
  return total;
}

// One side, gradients wanted, for channels-last maps in wide blocks, with compact scratch for the gradient: where the
// operator stands for all patches it writes to the maps.
template <class T, int W>
void distill_wide(DistillTask<T>& task, Scratch<T>& scratch) {
  const Plan<T>& plan = *task.plan[0];
  T *values = scratch.values[0], *gradient = scratch.gradients[0];
  gather<T, W>(plan, task.map[0], task.map[1], task.channels, values);
  const int first = task.gradient[0].data ? 0 : 1, last = task.gradient[1].data ? 1 : 0;
  const CellWriter<T, W> writer(task.gradient[first], task.channels), other(task.gradient[last], task.channels);
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
  if (is_finite_number(task.total)) {
    if (!assembled) clear(gradient, plan.gradient_cells * W);
    for (int64_t n = 0; n < plan.patch_count; ++n) {
      const Patch<T>& patch = plan.patches[n];
      if (patch.assembled) continue;
      task.total += patch.scale * pool_forward_backward<T, W>(patch, T(2.0 * patch.scale), values, scratch.sums[0],
                                                              scratch.sums[1], patch.gradient_base, gradient);
    }
    for (int64_t n = 0; n < plan.segment_count; ++n) {
      const Segment& s = plan.segments[n];
      if (s.gradient < 0) continue;
      const T* from = gradient + s.gradient * W;
      for (int64_t x = s.begin; x < s.end; ++x, from += W) write(s.row * plan.width + x, from);
    }
  } else {
    // Patch by patch (see distill_values), in blocks half as wide, so that values and gradient fit into the values'
    // scratch.
    task.total = 0.0;
    for (int64_t c = 0; c < task.channels.count; c += W / 2) {
      const int64_t left = task.channels.count - c;
      const ChannelBlock half{task.channels.begin + c, left < W / 2 ? left : W / 2, W / 2};
      gather<T, W / 2>(plan, task.map[0], task.map[1], half, values);
      T* half_gradient = values + (plan.cells + kSlack) * (W / 2);
      task.total += distill_values<T, W / 2>(task, half, false, values, half_gradient, scratch);
    }
  }
  finish_streams();
}

// One side, the loss alone.
template <class T, int W>
void distill_loss(DistillTask<T>& task, Scratch<T>& scratch) {
  const Plan<T>& plan = *task.plan[0];
  T* values = scratch.values[0];
  gather<T, W>(plan, task.map[0], task.map[1], task.channels, values);
  const auto drop = [](const GramRun&, int64_t, const T*) {};
  bool assembled = plan.gram.weight != nullptr;
  task.total = assembled ? 0.5 * apply_operator<T, W>(plan.gram, values, drop) : 0.0;
  if (!is_finite_number(task.total)) {  // see distill_values
    assembled = false;
    task.total = 0.0;
  }
  for (int64_t n = 0; n < plan.patch_count; ++n) {
    const Patch<T>& patch = plan.patches[n];
    if (assembled && patch.assembled) continue;
    task.total += patch.scale * pool_squares<T, W>(patch, values, scratch.sums[0]);
  }
}

// By the pooled differences themselves: for losses per box, and for maps that differ in shape.
template <class T, int W>
void distill_pooled(DistillTask<T>& task, Scratch<T>& scratch) {
  const int sides = task.plan[1] ? 2 : 1;
  T** pooled = scratch.pooled;
  for (int side = 0; side < sides; ++side) {
    const ImageView none, &other = sides == 1 ? task.map[1] : none;
    gather<T, W>(*task.plan[side], task.map[side], other, task.channels, scratch.values[side]);
    if (task.gradient[side].data) clear(scratch.gradients[side], task.plan[side]->cells * W);
  }
  task.total = 0.0;
  const int64_t bins = task.bins;
  for (int64_t n = 0; n < task.plan[0]->patch_count; ++n) {
    const Patch<T>& patch = task.plan[0]->patches[n];
    pool<T, W>(patch, scratch.values[0], scratch.sums[0], pooled[0]);
    if (sides == 2) {
      pool<T, W>(task.plan[1]->patches[n], scratch.values[1], scratch.sums[0], pooled[1]);
      for (int64_t i = 0; i < bins * W; ++i) pooled[0][i] -= pooled[1][i];
    }
    const double loss = patch.scale * inner_product<T, W>(pooled[0], pooled[0], bins);
    if (task.patch_losses) task.patch_losses[n] = loss;
    task.total += loss;
    for (int side = 0; side < sides; ++side) {
      if (!task.gradient[side].data) continue;
      const T factor = T((side == 0 ? 2.0 : -2.0) * patch.scale);
      pool_backward<T, W>(task.plan[side]->patches[n], factor, pooled[0], scratch.sums[0], scratch.gradients[side]);
    }
  }
  for (int side = 0; side < sides; ++side) {
    if (!task.gradient[side].data) continue;
    scatter<T, W>(*task.plan[side], scratch.gradients[side], T(1), task.channels, task.gradient[side]);
  }
}

template <class T, int W>
void distill_block(DistillTask<T>& task, Scratch<T>& scratch) {
  if (task.plan[1] || task.patch_losses) {
    if constexpr (W != kWideBlock) distill_pooled<T, W>(task, scratch);  // which has no wide blocks
  } else if (!task.gradient[0].data && !task.gradient[1].data) {
    distill_loss<T, W>(task, scratch);
  } else if constexpr (W == kWideBlock) {
    distill_wide<T, W>(task, scratch);
  } else {
    const Plan<T>& plan = *task.plan[0];
    T* values = scratch.values[0];
    gather<T, W>(plan, task.map[0], task.map[1], task.channels, values);
    const bool assembled = plan.gram.weight != nullptr;
    task.total = distill_values<T, W>(task, task.channels, assembled, values, scratch.gradients[0], scratch);
  }
}

template <class T, int W>
void align_block(const AlignTask<T>& task, Scratch<T>& scratch) {
  T *pooled = scratch.pooled[0], *sum = scratch.pooled[1], *values = scratch.values[0];
  const int64_t bins = task.bins;
  for (int64_t l = 0; l < task.levels; ++l) {
    const Plan<T>& plan = task.plans[l * task.plan_stride];
    gather<T, W>(plan, task.maps[l], ImageView{}, task.channels, values);
    values += (plan.cells + kSlack) * W;
  }
  const auto scatter_box = scatter_function<T, W>(task.output.element);
  int64_t next[kMaxLevels] = {};  // first patch of each level that is not done; they come in the boxes' order
  for (int64_t n = 0; n < task.box_count; ++n) {
    const int64_t box = task.boxes[n];
    clear(sum, bins * W);
    values = scratch.values[0];
    for (int64_t l = 0; l < task.levels; ++l) {
      const Plan<T>& plan = task.plans[l * task.plan_stride];
      if (next[l] < plan.patch_count && plan.patches[next[l]].box == box) {
        const Patch<T>& patch = plan.patches[next[l]++];
        pool<T, W>(patch, values, scratch.sums[0], pooled);
        const T scale = T(patch.scale);
        for (int64_t i = 0; i < bins * W; ++i) sum[i] += scale * pooled[i];
      }
      values += (plan.cells + kSlack) * W;
    }
    scatter_box(sum, T(1), task.output, CellRun{task.channels.begin, task.channels.count, box, 0, bins, bins});
  }
}

template <class T, int W>
void align_backward_block(const AlignBackwardTask<T>& task, Scratch<T>& scratch) {
  const Plan<T>& plan = *task.plan;
  T *gradient = scratch.gradients[0], *pooled = scratch.pooled[0];
  const int64_t bins = task.bins;
  const ImageView& in = task.output_gradient;
  const auto gather_box = gather_function<Gather::kCopy, T, W>(in.element);
  clear(gradient, plan.cells * W);
  for (int64_t n = 0; n < plan.patch_count; ++n) {
    const Patch<T>& patch = plan.patches[n];
    gather_box(in, in, CellRun{task.channels.begin, task.channels.count, patch.box, 0, bins, bins}, pooled);
    pool_backward<T, W>(patch, T(patch.scale), pooled, scratch.sums[0], gradient);
  }
  scatter<T, W>(plan, gradient, T(1), task.channels, task.gradient);
}

// The block's width becomes a constant. Double has blocks of 8 channels alone, which make a cache line.
template <class T>
void distill(DistillTask<T>& task, Scratch<T>& scratch) {
  if constexpr (kSame<T, float>) {
    if (task.channels.width == kWideBlock) return distill_block<T, int(kWideBlock)>(task, scratch);
    if (task.channels.width == 16) return distill_block<T, 16>(task, scratch);
  }
  distill_block<T, 8>(task, scratch);
}
template <class T>
void align(const AlignTask<T>& task, Scratch<T>& scratch) {
  const bool narrow = task.channels.width == 8;
  narrow ? align_block<T, 8>(task, scratch) : align_block<T, kLine / sizeof(T)>(task, scratch);
}
template <class T>
void align_backward(const AlignBackwardTask<T>& task, Scratch<T>& scratch) {
  const bool narrow = task.channels.width == 8;
  narrow ? align_backward_block<T, 8>(task, scratch) : align_backward_block<T, kLine / sizeof(T)>(task, scratch);
}

template <class T>
void add_scaled(T factor, const T* __restrict from, int64_t count, T* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable table = {{distill<float>, align<float>, align_backward<float>, add_scaled<float>},
                                    {distill<double>, align<double>, align_backward<double>, add_scaled<double>}};
  return table;
}

}  // namespace RAKD_ISA
}  // namespace rakd
