// Torch tensors as the kernels see them: views of maps, and the workspace.
#pragma once

#include <algorithm>
#include <limits>

#include "../arguments.h"
#include "launch.h"
#include "torch_platform.h"

namespace rakd {
namespace gpu {

// A last tile or block may end beyond the map, still at a number of 32 bits.
static_assert(kMaxCells + std::max(kTileColumns, kChannelBlock) - 1 <= std::numeric_limits<int32_t>::max());

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

// Calls f(T()) with the accumulation type.
template <class F>
void with_accumulation_type(bool is_double, const F& f) {
  if (is_double) {
    f(double());
  } else {
    f(float());
  }
}

// The map must have been checked. Kernels hold strides of rows and columns, and offsets in a row, in 32 bits.
inline Map map_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK((t.size(2) == 1 || t.stride(2) <= INT32_MAX) && (t.size(3) - 1) * t.stride(3) <= INT32_MAX, name,
                  ": expected rows less than 2^31 elements long and apart, got strides ", t.stride(2), " and ",
                  t.stride(3), " for ", t.size(3), " columns");
  Map map{t.data_ptr(), number_type(t, name), {}, {}};
  for (int i = 0; i < 4; ++i) map.size[i] = t.size(i), map.stride[i] = t.stride(i);
  return map;
}

inline Maps maps_of(const Tensors& maps, const DoubleList& strides, const Tensors& like, const char* name) {
  check_maps(maps, strides, like, name);
  Maps result;
  for (const Tensor& t : maps) result.push_back(map_of(t, name));
  return result;
}

// A dense map [B, C, H, W] of `like`'s dtype and device.
inline Tensor empty_map(const Tensor& like, const IntList& shape, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline Problem make_problem(const Tensor& rows, const Tensor& index, int64_t images, const Tensor& like,
                            const DoubleList& strides, const DoubleList& expert_strides, const IntList& output_size,
                            int64_t sampling_ratio) {
  check_sampling(output_size, sampling_ratio);
  check_rows(rows, index, images, static_cast<int64_t>(strides.size()), like);
  return Problem{rows.size(0),
                 images,
                 {strides, expert_strides},
                 {output_size[0], output_size[1]},
                 sampling_ratio,
                 static_cast<const double*>(rows.data_ptr()),
                 static_cast<const int32_t*>(index.data_ptr())};
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
