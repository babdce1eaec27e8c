// The few things device code needs from its platform: nvcc, or a C++ compiler with an emulator that runs the same
// kernels on the CPU (tests/emulator). Kernels use nothing of CUDA beyond what is listed here:
//   __global__, __device__, __forceinline__, __restrict__; threadIdx, blockIdx, blockDim, gridDim (x, y, z);
//   __syncthreads(), __syncwarp(); __shfl_xor_sync, __shfl_sync (int, float, double); __popc; min, max; dynamic shared
//   memory by RAKD_SHARED, at most 48 KiB; launches by RAKD_LAUNCH; RAKD_UNROLL, RAKD_ROLLED, RAKD_OPAQUE, RAKD_KEEP,
//   RAKD_ANY_CALLER. No atomics and no fences: each element has one owner, so that results are the same in every run.
#pragma once

#if defined(RAKD_EMULATE)

#include "emulator.h"

#define RAKD_UNROLL
#define RAKD_ROLLED
#define RAKD_OPAQUE(pointer)
#define RAKD_KEEP(pointer)
#define RAKD_ANY_CALLER

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Before a template for host and device whose functors are for either alone.
#define RAKD_ANY_CALLER _Pragma("nv_exec_check_disable")
// Before a loop whose array must stay in registers.
#define RAKD_UNROLL _Pragma("unroll")
// Before a loop that is not worth more code.
#define RAKD_ROLLED _Pragma("unroll 1")

// Stops nvcc from repeating the arithmetic behind a pointer at each use: in the kernels' loops that costs more
// instructions than the register that holds it.
#define RAKD_KEEP(pointer) asm("" : "+l"(pointer))

// The same for a pointer to global memory, which is not null. nvcc would forget that it is global, and generic loads
// are slower.
#define RAKD_OPAQUE(pointer)               \
  do {                                     \
    RAKD_KEEP(pointer);                    \
    __builtin_assume(__isGlobal(pointer)); \
  } while (false)

// The block's dynamic shared memory, 16-byte aligned, as an array of bytes.
#define RAKD_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// kernel<<<grid, block, shared bytes, stream>>>(arguments...); `kernel` may be a template instance in parentheses.
// Nothing is launched after a launch that failed, whose results it might read; RAKD_CHECK_LAUNCH then tells.
#define RAKD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                               \
  do {                                                                                                            \
    if (cudaPeekAtLastError() == cudaSuccess) kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
  } while (false)

#endif
