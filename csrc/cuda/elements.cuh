// Loads and stores of the maps' dtypes, and views of maps with any strides.
#pragma once

#include "tables.cuh"

namespace rakd {
namespace gpu {

// float and double accumulate as themselves, halves as float.
template <class E>
struct Accumulator {
  typedef float type;
};
template <>
struct Accumulator<double> {
  typedef double type;
};

RAKD_HD float widen(float value) { return value; }
RAKD_HD double widen(double value) { return value; }
RAKD_HD float widen(__half value) { return __half2float(value); }
RAKD_HD float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

RAKD_HD void narrow(float value, float* out) { *out = value; }
RAKD_HD void narrow(double value, double* out) { *out = value; }
RAKD_HD void narrow(float value, __half* out) { *out = __float2half_rn(value); }
RAKD_HD void narrow(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

// Maps [B, C, H, W] of one level; strides in elements. data == nullptr: not wanted.
template <class E>
struct MapView {
  E* data;
  int64_t stride[4];
};

template <class E>
struct Pyramid {
  MapView<E> level[kMaxLevels];
};

}  // namespace gpu
}  // namespace rakd
