// What the CPU and the CUDA ops have in common about torch tensors that are feature maps.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

namespace rakd {

// The layout that gradients take after their map. rakd_ops/_layout.py states the same rule for fake tensors.
inline bool is_channels_last(const torch::stable::Tensor& t) {
  return t.stride(1) == 1 && t.size(1) > 1 && !t.is_contiguous();
}

// A dense map [B, C, H, W] of `like`'s dtype and device.
inline torch::stable::Tensor empty_map(const torch::stable::Tensor& like, const std::vector<int64_t>& shape,
                                       bool channels_last) {
  const auto format =
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

}  // namespace rakd
