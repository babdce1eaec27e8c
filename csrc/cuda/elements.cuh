// Feature maps as kernels see them: element types that are chosen at run time, and views with any strides.
#pragma once

#include "../prepare.h"
#include "platform.h"

namespace rakd {
namespace gpu {

// Loads convert an element to the type that sums are kept in; stores convert back.
RAKD_HD float to_accum(float value) { return value; }
RAKD_HD double to_accum(double value) { return value; }
RAKD_HD float to_accum(__half value) { return __half2float(value); }
RAKD_HD float to_accum(__nv_bfloat16 value) { return __bfloat162float(value); }

RAKD_HD void from_accum(double value, double* out) { *out = value; }
RAKD_HD void from_accum(double value, float* out) { *out = static_cast<float>(value); }
RAKD_HD void from_accum(float value, __half* out) { *out = __float2half_rn(value); }
RAKD_HD void from_accum(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

// Bytes of an element of a map.
RAKD_HD int64_t element_bytes(Number type) { return type == Number::kDouble ? 8 : type == Number::kFloat ? 4 : 2; }

// Calls f(E()) for the element type E that `type` names. Kernels do so outside of their loops. A call that sums in
// float has no float64 maps, so its kernels have no code for them.
RAKD_ANY_CALLER
template <class T, class F>
__host__ __device__ __forceinline__ void with_element_type(Number type, const F& f) {
  if (type == Number::kHalf) {
    f(__half());
  } else if (type == Number::kBFloat16) {
    f(__nv_bfloat16());
  } else if (type == Number::kFloat || sizeof(T) == sizeof(float)) {
    f(float());
  } else {
    f(T());
  }
}

// The maps of one level, [B, C, H, W]. Strides are in elements; those of rows and columns, and any offset in a row, fit
// 32 bits (map_view() of tensors.h). data == nullptr: not wanted.
struct MapView {
  void* data;
  int64_t image_stride, channel_stride;
  uint32_t row_stride, column_stride;

  // The first cell of a channel of an image.
  template <class E>
  RAKD_HD E* plane(int64_t image, int64_t channel) const {
    return static_cast<E*>(data) + image * image_stride + channel * channel_stride;
  }
};

struct Pyramid {
  MapView level[kMaxLevels];
  Number type[kMaxLevels];
};

// Neighbouring values, which are moved in words of up to 16 bytes where they lie together.
template <class E, int kCount>
struct alignas(kCount * sizeof(E) < 16 ? kCount * sizeof(E) : 16) ChannelGroup {
  E value[kCount];
};

template <class T>
using Quad = ChannelGroup<T, 4>;

}  // namespace gpu
}  // namespace rakd
