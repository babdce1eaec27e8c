// Runs CUDA kernels on the CPU, for tests: what csrc/cuda/platform.h includes when RAKD_EMULATE is defined.
//
// Here stand CUDA's names, as far as kernels may use them; engine.h runs the threads. What is refused, by an
// exception at the launch: threads of a block that wait at different places or return while others wait, lanes
// missing from a shuffle's mask or outside of it, writes just outside shared memory, launches beyond CUDA's limits.
// Uninitialised shared memory, and what a shuffle reads from a lane that takes no part, is all ones: NaN, or -1.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "types.h"

// A binding, which is not instrumented, sees the declarations of what it binds and must not see the engine.
#if !defined(RAKD_EMULATE_BINDING)

#include "engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#define RAKD_SHARED(name) unsigned char* const name = ::emulator::engine_of_kernel("shared memory").shared()

#define RAKD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                    \
  ::emulator::launch(                                                                                  \
      #kernel, [&](const auto&... parameters) { (kernel)(parameters...); }, grid, block, shared_bytes, \
      stream, ##__VA_ARGS__)

namespace emulator {

template <typename Kernel, typename... Arguments>
void launch(const char* name, const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  // The arguments are evaluated once, as CUDA does.
  const auto call = [&] { kernel(arguments...); };
  using Call = decltype(call);
  run({name, grid, block, shared_bytes, [](const void* it) { (*static_cast<Call*>(it))(); }, &call});
}

inline Engine& engine_of_kernel(const char* what) {
  if (engine == nullptr || engine->running == nullptr) throw Error(std::string(what) + " outside of a kernel");
  return *engine;
}

template <typename T>
T shuffle(State kind, unsigned mask, T value, int64_t argument, int width, int line, const char* file) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA does not shuffle this type");
  const Unobserved unobserved;
  Engine& self = engine_of_kernel("shuffle");
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0) throw Error("shuffle width is not a power of two");
  const int64_t lane = self.running->thread % warpSize, begin = lane & ~int64_t{width - 1};
  int64_t source = kind == State::kIndex  ? begin + (argument & (width - 1))
                   : kind == State::kUp   ? lane - argument
                   : kind == State::kDown ? lane + argument
                                          : lane ^ argument;
  // Beyond the segment a lane reads itself; only xor may reach into an earlier one.
  if (source >= begin + width || source < 0 || (kind == State::kUp && source < begin)) source = lane;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = self.wait({kind, line, file, mask, width}, bits, static_cast<int>(source));
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace emulator

// The last two arguments of each are the caller's place: a barrier is told from another one by it.
#define RAKD_EMULATED_PLACE int line = __builtin_LINE(), const char *file = __builtin_FILE()

inline void __syncthreads(RAKD_EMULATED_PLACE) {
  const emulator::Unobserved unobserved;
  emulator::engine_of_kernel("__syncthreads").wait({emulator::State::kBarrier, line, file, 0, 0});
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, RAKD_EMULATED_PLACE) {
  const emulator::Unobserved unobserved;
  emulator::engine_of_kernel("__syncwarp").wait({emulator::State::kWarp, line, file, mask, 0});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, RAKD_EMULATED_PLACE) {
  return emulator::shuffle(emulator::State::kIndex, mask, value, source, width, line, file);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, RAKD_EMULATED_PLACE) {
  return emulator::shuffle(emulator::State::kUp, mask, value, delta, width, line, file);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, RAKD_EMULATED_PLACE) {
  return emulator::shuffle(emulator::State::kDown, mask, value, delta, width, line, file);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, RAKD_EMULATED_PLACE) {
  return emulator::shuffle(emulator::State::kXor, mask, value, lane_mask, width, line, file);
}

// Orders nothing; the kernels have none, and the emulator's own tests count with it.
inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}

#define RAKD_EMULATED_MIN_MAX(T)                   \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
RAKD_EMULATED_MIN_MAX(int)
RAKD_EMULATED_MIN_MAX(unsigned)
RAKD_EMULATED_MIN_MAX(long)
RAKD_EMULATED_MIN_MAX(unsigned long)
RAKD_EMULATED_MIN_MAX(long long)
RAKD_EMULATED_MIN_MAX(unsigned long long)
// Of a number and NaN these give the number.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float __bfloat162float(__nv_bfloat16 value) { return emulator::as_float(uint32_t{value.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7FFF};
  const uint32_t bits = emulator::as_bits(value);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 0x1F, fraction = value.bits & 0x3FF;
  if (exponent == 0) return emulator::as_float(sign | emulator::as_bits(static_cast<float>(fraction) * 0x1p-24f));
  return emulator::as_float(sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13);
}

inline __half __float2half_rn(float value) {
  if (value != value) return {0x7FFF};
  const uint32_t bits = emulator::as_bits(value), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  uint32_t half;
  if (size >= emulator::as_bits(65520.0f)) {  // half way between the largest number and what would be the next
    half = 0x7C00;
  } else if (size < emulator::as_bits(0x1p-14f)) {
    // Subnormal. The spacing of floats at 0.5 is that of subnormal halves, so the addition rounds.
    half = emulator::as_bits(emulator::as_float(size) + 0.5f) - emulator::as_bits(0.5f);
  } else {
    half = (size - (112u << 23) + 0xFFF + (size >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

#endif
