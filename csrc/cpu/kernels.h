// Interface between the CPU ops and the kernels, which are compiled several times for different instruction sets. Plain
// structs only: a kernel file must not instantiate functions of the standard library's templates, or the linker might
// hand the AVX-512 copy of one to code that runs everywhere.
#pragma once

#include <cstdint>

#include "../prepare.h"
#include "box_plan.h"

namespace rakd {

// One image of a feature map, [C, H, W]; strides in elements.
struct ImageView {
  void* data = nullptr;
  Number element = Number::kFloat;  // or kDouble, kHalf, kBFloat16
  int64_t channel_stride = 0, row_stride = 0, column_stride = 0;
};

// Channels [begin, begin + count) of the maps, handled as one vector block of `width` channels.
struct ChannelBlock {
  int64_t begin, count, width;
};

// Buffers of one worker; ScratchSizes in tasks.h says how large. T is the type that a call computes in: double if any
// of its maps is float64, else float. Maps are converted where they are gathered and scattered.
template <class T>
struct Scratch {
  T* values[2];     // [cells][width] gathered maps, one per side
  T* gradients[2];  // [cells][width] their gradients
  T* sums[2];       // [rows][width] one column of bins: a value for each support row of a patch
  T* pooled[2];     // [bins][width] of one patch, one per side
};

// Σ_k scale_k |RoIAlign(A) - RoIAlign(E)|² of one image and level. When the maps have one shape and stride there is one
// side, as the difference is taken while gathering; otherwise the sides are pooled apart.
template <class T>
struct DistillTask {
  const Plan<T>* plan[2];  // plan[1] == nullptr: one side
  ImageView map[2];        // apprentice, expert
  ImageView gradient[2];   // data == nullptr: not wanted
  int64_t bins;            // of a box
  ChannelBlock channels;
  double* patch_losses;  // out [patches], where the losses of the boxes are wanted; else nullptr
  double total;          // out
};

// out[k] = Σ_l scale_kl RoIAlign(F_l, b_k) for the boxes of one image. The patches of each plan are in the boxes'
// order; those of weight zero are missing.
template <class T>
struct AlignTask {
  const Plan<T>* plans;   // [levels], plan_stride apart
  const ImageView* maps;  // [levels]
  int64_t plan_stride, levels;
  const int32_t* boxes;  // [box_count] rows of the output that belong to this image
  int64_t box_count;
  int64_t bins;  // of a box
  ChannelBlock channels;
  ImageView output;  // [C, K, bins]
};

template <class T>
struct AlignBackwardTask {
  const Plan<T>* plan;
  ImageView gradient;
  int64_t bins;  // of a box
  ChannelBlock channels;
  ImageView output_gradient;  // [C, K, bins]
};

// The kernels of one instruction set.
template <class T>
struct Kernels {
  void (*distill)(DistillTask<T>&, Scratch<T>&);
  void (*align)(const AlignTask<T>&, Scratch<T>&);
  void (*align_backward)(const AlignBackwardTask<T>&, Scratch<T>&);
  void (*add_scaled)(T factor, const T* from, int64_t count, T* to);  // to[i] += factor from[i]
};
struct KernelTable {
  Kernels<float> single_precision;
  Kernels<double> double_precision;
};

// The widest block, of two cache lines of float; for channels-last float maps.
constexpr int64_t kWideBlock = 32;

// Spare scratch cells after the last one: vector tiles may spill past a segment's end.
constexpr int64_t kSlack = 8;

// The kernels for the best instruction set of this processor (dispatch.cpp). The environment variable RAKD_CPU_ISA
// (baseline, avx2, avx512) chooses another one, for tests and measurements; one that cannot run here is an error.
const KernelTable& kernel_table();

template <class T>
const Kernels<T>& best_kernels() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return kernel_table().single_precision;
  } else {
    return kernel_table().double_precision;
  }
}

namespace baseline {
const KernelTable& kernels();
}
namespace avx2 {
const KernelTable& kernels();
}
namespace avx512 {
const KernelTable& kernels();
}

}  // namespace rakd
