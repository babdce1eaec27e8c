// The backward pass of the loss: gradients that were computed with the loss, times the incoming one; in place, and
// without touching memory where the incoming one is 1, which only the device knows.
#pragma once

#include "elements.cuh"

namespace rakd {
namespace gpu {

constexpr int kScaleThreads = 256;
constexpr int kMaxScaled = 2 * kMaxLevels;  // arrays of one launch
constexpr int kVectorBytes = 16;            // that are loaded and stored at once

template <class T>
struct ScaleGradients {
  const T* factor;            // [1]
  void* data[kMaxScaled];     // each dense
  Number type[kMaxScaled];    // of their elements
  int64_t count[kMaxScaled];  // elements of each
};

// Block (vectors in turns, array).
template <class T>
__global__ void __launch_bounds__(kScaleThreads) scale_gradients(ScaleGradients<T> call) {
  const T factor = *call.factor;
  if (factor == T(1)) return;
  const int64_t count = call.count[blockIdx.y];
  with_element_type<T>(call.type[blockIdx.y], [&](auto element) {
    typedef decltype(element) E;
    constexpr int kCount = kVectorBytes / sizeof(E);
    typedef ChannelGroup<E, kCount> Vector;
    E* data = static_cast<E*>(call.data[blockIdx.y]);
    const bool aligned = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
    const auto scale = [&](E& value) { from_accum(T(to_accum(value)) * factor, &value); };
    const int64_t step = int64_t(gridDim.x) * kScaleThreads * kCount;
    for (int64_t first = (int64_t(blockIdx.x) * kScaleThreads + threadIdx.x) * kCount; first < count; first += step) {
      if (aligned && first + kCount <= count) {
        Vector* place = reinterpret_cast<Vector*>(data + first);
        Vector values = *place;
        RAKD_UNROLL
        for (int i = 0; i < kCount; ++i) scale(values.value[i]);
        *place = values;
      } else {
        for (int64_t i = first; i < first + kCount && i < count; ++i) scale(data[i]);
      }
    }
  });
}

}  // namespace gpu
}  // namespace rakd
