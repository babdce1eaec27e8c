// The launch functions of small_kernels.cpp, for its binding.
#pragma once

#include "cuda/platform.h"

namespace small {

// Ways in which the next kernel can go wrong.
// clang-format off
#define MISTAKES(X) \
  X(none) X(divergent_barrier) X(two_barriers) X(early_return) X(uninitialised) \
  X(shared_overrun) X(shared_underrun) X(lane_missing) X(lane_outside) X(masks_differ) \
  X(shuffle_against_barrier) X(returned_lane) X(exception) X(global_overrun) X(global_underrun) \
  X(far_overrun) X(write_input) X(unwritten) X(block_race) X(hidden_race) \
  X(undefined)
// clang-format on

#define MISTAKE(name) name,
enum class Mistake : int { MISTAKES(MISTAKE) };
#undef MISTAKE

template <typename T>
void run_block_sums(const T* input, T* sums, int count, int blocks, int threads, cudaStream_t stream);
template <typename T>
void run_shuffles(const T* input, T* output, int threads, unsigned mask, int argument, int width, cudaStream_t stream);
template <typename T>
void run_widen(const T* input, float* output, int count, cudaStream_t stream);
template <typename T>
void run_narrow(const float* input, T* output, int count, cudaStream_t stream);
void run_transpose(const float* input, float* output, int rows, int columns, int tile, dim3 block, cudaStream_t stream);
void run_prefix_sum(int* values, int blocks, int threads, cudaStream_t stream);
void run_histogram(const int* input, int* bins, int count, int threads, cudaStream_t stream);
void run_coordinates(int64_t* output, dim3 grid, dim3 block, cudaStream_t stream);
void run_mistaken(Mistake mistake, float* input, float* output, int blocks, int threads, int shared_bytes,
                  cudaStream_t stream);

}  // namespace small
