// Interface between the CPU ops and the kernels, which are compiled several times for different instruction
// sets. Plain structs only: a kernel file must not instantiate templates of the standard library, or the linker
// might hand the AVX-512 copy of one to code that runs everywhere.
#pragma once

#include <cstdint>

#include "plan.h"

namespace rakd {

enum class Element : int32_t { kFloat, kDouble, kHalf, kBFloat16 };

// One image of a feature map; strides in elements.
struct ImageView {
  void* data = nullptr;
  int64_t channel_stride = 0, row_stride = 0, column_stride = 0;
};

// Channels [begin, begin + count) of the maps, handled as one vector block of `width` channels.
struct ChannelBlock {
  int64_t begin, count, width;
};

// Buffers of one worker, of the accumulation type; ScratchSizes in dispatch.h says how large.
struct Scratch {
  void* values[2];     // gathered maps, one per side
  void* gradients[2];  // their gradients
  void* sums[2];       // one column of bins: a value for each touched row of a patch
  void* pooled[2];     // bins_y x bins_x of one patch, one per side
};

// Σ_k scale_k |RoIAlign(A) - RoIAlign(E)|² of one image and level. When the maps have one shape and stride there is
// one side and the difference is taken at load; otherwise the sides are pooled apart.
template <class T>
struct DistillTask {
  const Plan<T>* plan[2];  // plan[1] == nullptr: one side
  ImageView map[2];        // apprentice, expert
  ImageView gradient[2];   // data == nullptr: not wanted
  int64_t bins_y, bins_x;
  ChannelBlock channels;
  double* patch_losses;  // out, one per patch, where the losses of the boxes are wanted; else nullptr
  double total;          // out
};

// out[k] = Σ_l scale_kl RoIAlign(F_l, b_k) for the boxes of one image; the patches of all plans are parallel or,
// where a level's weight is zero, missing.
template <class T>
struct AlignTask {
  const Plan<T>* const* plans;  // one per level
  const ImageView* maps;
  int64_t levels;
  const int64_t* boxes;  // rows of the output that belong to this image
  int64_t box_count;
  int64_t bins_y, bins_x;
  ChannelBlock channels;
  int64_t total_channels;
  void* output;  // [K, C, bins_y, bins_x]
};

template <class T>
struct AlignBackwardTask {
  const Plan<T>* plan;
  ImageView gradient;
  int64_t bins_y, bins_x;
  ChannelBlock channels;
  int64_t total_channels;
  const void* output_gradient;  // [K, C, bins_y, bins_x]
};

// The kernels of one instruction set. `element` is the dtype of all maps of the task.
struct Kernels {
  void (*distill_float)(DistillTask<float>&, Element, Scratch&);
  void (*distill_double)(DistillTask<double>&, Element, Scratch&);
  void (*align_float)(const AlignTask<float>&, Element, Scratch&);
  void (*align_double)(const AlignTask<double>&, Element, Scratch&);
  void (*align_backward_float)(const AlignBackwardTask<float>&, Element, Scratch&);
  void (*align_backward_double)(const AlignBackwardTask<double>&, Element, Scratch&);
  // to[i] += factor from[i]
  void (*add_scaled_float)(float factor, const float* from, int64_t count, float* to);
  void (*add_scaled_double)(double factor, const double* from, int64_t count, double* to);
};

// The widest block, of two cache lines of float.
constexpr int64_t kWideBlock = 32;

// Spare scratch pixels after the last one: vector tiles may spill past a segment's end.
constexpr int64_t kSlack = 8;

namespace baseline {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}

}  // namespace rakd
