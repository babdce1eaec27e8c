// The steps of csrc/cuda/launch.h behind plain pointers, as csrc/cuda/ops.cu strings them together: what the binding of
// the real kernels calls.
#pragma once

#include <stdint.h>

#include <vector>

#include "cuda/platform.h"

namespace real {

// One call's shapes and options. Maps are [images, channels, height, width]; `strides` in elements.
struct Map {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  int64_t size[2] = {0, 0};
};

struct Problem {
  int64_t images = 0, channels = 0, boxes = 0;
  std::vector<double> strides, expert_strides;
  int64_t bins[2] = {1, 1};
  int64_t sampling_ratio = 2, assignment = 0;
  double sigma = 1.0, canonical_size = 224.0, canonical_level = 4.0;
  const double* rows = nullptr;
  const double* coefficients = nullptr;
  int threads[5] = {64, 128, 256, 256, 128};  // of the blocks that make tables, pool, sum, spread and of gram_gradient
  int form = 0;                               // of a training step: by shape, pooled or Gram
};

// Gradients may be empty: not wanted. With gradients in the Gram form, `losses` are left as they are. Tells whether it
// was the Gram form.
template <class E>
bool run_distill(const Problem& problem, const std::vector<Map>& apprentice, const std::vector<Map>& expert,
                 const std::vector<Map>& apprentice_gradient, const std::vector<Map>& expert_gradient, double* losses,
                 double* total);
template <class E>
void run_align(const Problem& problem, const std::vector<Map>& features, E* output);
template <class E>
void run_align_backward(const Problem& problem, const E* output_gradient, const std::vector<Map>& gradients);

}  // namespace real
