// The steps of csrc/cuda/launch.h behind plain pointers, as csrc/cuda/ops.cu strings them together: what the binding of
// the real kernels calls.
#pragma once

#include <stdint.h>

#include <vector>

#include "cuda/platform.h"
#include "prepare.h"

namespace real {

// An array of up to four dimensions; strides in elements.
struct Array {
  void* data = nullptr;
  rakd::Number type = rakd::Number::kFloat;
  int64_t size[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 0};

  rakd::Numbers numbers() const { return rakd::Numbers{data, type, {stride[0], stride[1]}}; }
};
typedef std::vector<Array> Arrays;

struct Boxes {
  Arrays boxes;  // one [K, 5], or [K_b, 4] for each image
  rakd::Preparation preparation{};
};

struct Call {
  std::vector<double> strides[2];
  int64_t bins[2] = {1, 1};
  int64_t sampling_ratio = 2;
  Array rows, index;
  int threads[3] = {64, 128, 256};  // of the blocks of build_tables, pooling and backward
};

void run_prepare(const Boxes& boxes, double* rows, int32_t* index);
void run_level_weights(const Boxes& boxes, const Array& weights);
// Gradients may be empty: not wanted. With gradients `losses` are left as they are.
void run_distill(const Call& call, const Arrays (&maps)[2], const Arrays (&gradients)[2], const Array& factor,
                 const Array& losses, const Array& total);
void run_align(const Call& call, const Arrays& features, const Array& output);
void run_align_backward(const Call& call, const Array& output_gradient, const Arrays& gradients);

}  // namespace real
