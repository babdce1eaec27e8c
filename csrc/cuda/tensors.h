// Torch tensors as the kernels see them: checks of the ops' arguments, views of maps, and the workspace.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <vector>

#include "../maps.h"
#include "launch_gram.h"
#include "torch_platform.h"

namespace rakd {
namespace gpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using DoubleList = std::vector<double>;
using IntList = std::vector<int64_t>;

// The workspace of a call: one allocation with offsets. It goes back to torch's allocator with this object, which keeps
// it from other streams until the kernels launched here are done, as for any tensor.
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : device_(like.device()) {}

  template <class U>
  U* take(int64_t count) {
    bytes_ = (bytes_ + 255) / 256 * 256;
    U* place = memory_ ? reinterpret_cast<U*>(memory_ + bytes_) : nullptr;
    bytes_ += count * static_cast<int64_t>(sizeof(U));
    return place;
  }

  // Calls f(*this) twice: once to add up sizes, once to hand out the memory.
  template <class F>
  void lay_out(const F& f) {
    f(*this);
    bytes_ = std::max<int64_t>(bytes_, 1);  // kernels may assume that no pointer is null
    tensor_ = torch::stable::empty({bytes_}, ScalarType::Byte, std::nullopt, device_);
    memory_ = static_cast<unsigned char*>(tensor_->data_ptr());
    bytes_ = 0;
    f(*this);
  }

 private:
  torch::stable::Device device_;
  std::optional<Tensor> tensor_;
  unsigned char* memory_ = nullptr;
  int64_t bytes_ = 0;
};

inline bool same_device(const Tensor& t, const Tensor& like) {
  return is_on_device(t) && t.get_device_index() == like.get_device_index();
}

inline Number number_type(const Tensor& t, const char* name) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::Half,  ScalarType::BFloat16,
                                   ScalarType::Byte,  ScalarType::Char,   ScalarType::Short, ScalarType::Int,
                                   ScalarType::Long};  // in the order of Number
  const auto found = std::find(std::begin(kTypes), std::end(kTypes), t.scalar_type());
  STD_TORCH_CHECK(found != std::end(kTypes), name, ": expected floating-point numbers or integers");
  return static_cast<Number>(found - std::begin(kTypes));
}

inline bool is_floating(Number type) { return type <= Number::kBFloat16; }

// Calls f(T()) with the accumulation type.
template <class F>
void with_accumulation_type(bool is_double, const F& f) {
  if (is_double) {
    f(double());
  } else {
    f(float());
  }
}

// Numbers [n] or [n, m] on the device of `like`.
inline Numbers numbers(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(same_device(t, like), name, ": expected a tensor on the device of the others");
  Numbers result{t.data_ptr(), number_type(t, name), {0, 0}};
  for (int64_t i = 0; i < t.dim() && i < 2; ++i) result.stride[i] = t.stride(i);
  return result;
}

// Kernels hold strides of rows and columns, and offsets in a row, in 32 bits.
inline Map map_view(const Tensor& t, const char* name) {
  const Number type = number_type(t, name);
  STD_TORCH_CHECK(is_floating(type), name, ": expected float32, float64, float16 or bfloat16 maps");
  STD_TORCH_CHECK(t.size(1) > 0 && t.size(1) < INT32_MAX, name, ": expected 1 to 2^31 - 2 channels, got ", t.size(1));
  for (int64_t i = 2; i < 4; ++i) {
    STD_TORCH_CHECK(t.size(i) > 0 && t.size(i) < INT32_MAX, name, ": expected 1 to 2^31 - 2 rows and columns, got ",
                    t.size(i));
  }
  STD_TORCH_CHECK((t.size(2) == 1 || t.stride(2) <= INT32_MAX) && (t.size(3) - 1) * t.stride(3) <= INT32_MAX, name,
                  ": expected rows less than 2^31 elements long and apart, got strides ", t.stride(2), " and ",
                  t.stride(3), " for ", t.size(3), " columns");
  return Map{MapView{t.data_ptr(), t.stride(0), t.stride(1), static_cast<uint32_t>(t.stride(2)),
                     static_cast<uint32_t>(t.stride(3))},
             type,
             static_cast<int32_t>(t.size(1)),
             {t.size(2), t.size(3)}};
}

// The maps of a pyramid: [B, C_l, H_l, W_l] on one device, one B.
inline Maps map_views(const std::vector<Tensor>& maps, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(!maps.empty() && maps.size() <= kMaxLevels, name, ": expected 1 to ", kMaxLevels, " maps, got ",
                  maps.size());
  Maps views;
  for (const Tensor& t : maps) {
    STD_TORCH_CHECK(t.dim() == 4 && same_device(t, like) && t.size(0) == like.size(0), name,
                    ": expected CUDA maps [B, C, H, W] of one device and batch size");
    views.push_back(map_view(t, name));
  }
  return views;
}

inline Problem make_problem(const Tensor& rows, const Tensor& index, int64_t images, const Tensor& like,
                            const DoubleList& strides, const IntList& output_size, int64_t sampling_ratio) {
  STD_TORCH_CHECK(output_size.size() == 2 && output_size[0] > 0 && output_size[1] > 0,
                  "output_size: expected two positive numbers");
  STD_TORCH_CHECK(output_size[0] <= INT32_MAX / output_size[1], "output_size: expected fewer than 2^31 bins, got ",
                  output_size[0], " x ", output_size[1]);
  STD_TORCH_CHECK(sampling_ratio >= 0 && sampling_ratio <= INT32_MAX, "sampling_ratio: expected 0 to 2^31 - 1, got ",
                  sampling_ratio);
  const int64_t width = 5 + static_cast<int64_t>(strides.size());
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == width && rows.scalar_type() == ScalarType::Double &&
                      rows.is_contiguous() && same_device(rows, like),
                  "rows: expected contiguous float64 [K, ", width, "] on the maps' device");
  STD_TORCH_CHECK(images < INT32_MAX && rows.size(0) < INT32_MAX, "boxes: expected fewer than 2^31 boxes and images");
  STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == images + 1 + rows.size(0) &&
                      index.scalar_type() == ScalarType::Int && index.is_contiguous() && same_device(index, like),
                  "index: expected contiguous int32 [", images + 1 + rows.size(0), "] on the maps' device");
  Problem problem;
  problem.boxes = rows.size(0);
  problem.images = images;
  problem.strides[0] = strides;
  for (int axis = 0; axis < 2; ++axis) problem.bins[axis] = output_size[axis];
  problem.sampling_ratio = sampling_ratio;
  problem.rows = static_cast<const double*>(rows.data_ptr());
  problem.index = static_cast<const int32_t*>(index.data_ptr());
  return problem;
}

// Whether a map's elements fill its memory, in one of the layouts that gradients have.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const int64_t channels = t.size(1), row = t.size(3) * channels;
  return t.stride(1) == 1 && (t.size(3) == 1 || t.stride(3) == channels) && (t.size(2) == 1 || t.stride(2) == row) &&
         (t.size(0) == 1 || t.stride(0) == t.size(2) * row);
}

}  // namespace gpu
}  // namespace rakd
