// The way back through the loss: its gradients, made in the forward pass, times the one that comes in; in place, and
// without touching memory where that one is 1, which only the device knows.
#pragma once

#include "elements.cuh"

namespace rakd {
namespace gpu {

constexpr int kScaleThreads = 256;
constexpr int kMostScaled = 2 * kMaxLevels;  // arrays of one launch

template <class E>
struct Scale {
  typedef typename Accumulator<E>::type T;
  const T* factor;
  E* data[kMostScaled];                  // each dense
  int64_t count[kMostScaled];            // elements of each
  int64_t first_piece[kMostScaled + 1];  // pieces of kScaleThreads vectors, numbered through; then their number
};

// Elements that are loaded and stored at once.
template <class E>
struct alignas(16) Vector {
  static constexpr int kCount = 16 / sizeof(E);
  E value[kCount];
};

// Blocks take the pieces in turns.
template <class E>
__global__ void __launch_bounds__(kScaleThreads) scale(Scale<E> call) {
  typedef typename Accumulator<E>::type T;
  const T factor = *call.factor;
  if (factor == T(1)) return;
  int array = 0;
  for (int64_t piece = blockIdx.x; piece < call.first_piece[kMostScaled]; piece += gridDim.x) {
    while (piece >= call.first_piece[array + 1]) ++array;
    E* data = call.data[array];
    const int64_t count = call.count[array];
    const int64_t first =
        ((piece - call.first_piece[array]) * kScaleThreads + int64_t(threadIdx.x)) * Vector<E>::kCount;
    const bool aligned = reinterpret_cast<uintptr_t>(data) % sizeof(Vector<E>) == 0;
    if (aligned && first + Vector<E>::kCount <= count) {
      Vector<E>* place = reinterpret_cast<Vector<E>*>(data + first);
      Vector<E> values = *place;
      RAKD_UNROLL
      for (int i = 0; i < Vector<E>::kCount; ++i) narrow(widen(values.value[i]) * factor, &values.value[i]);
      *place = values;
    } else {
      for (int64_t i = first; i < first + Vector<E>::kCount && i < count; ++i)
        narrow(widen(data[i]) * factor, data + i);
    }
  }
}

}  // namespace gpu
}  // namespace rakd
