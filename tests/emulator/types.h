// CUDA's types, as far as launch functions and kernels may use them.
#pragma once

#include <stdint.h>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct EmulatedStream*;

struct __half {
  uint16_t bits;
};

struct __nv_bfloat16 {
  uint16_t bits;
};
