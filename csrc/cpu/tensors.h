// What the CPU ops read off torch tensors, and where their results lie.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <memory>
#include <vector>

#include "../maps.h"
#include "kept_memory.h"
#include "kernels.h"

namespace rakd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A batch of maps of one level: [B, C, H, W] with any strides.
struct MapBatch {
  char* data;
  int64_t batch, channels, height, width;
  int64_t stride[4];
  int64_t element_size;
  bool channels_last;

  ImageView image(int64_t b) const {
    return ImageView{data + b * stride[0] * element_size, stride[1], stride[2], stride[3]};
  }
};

inline MapBatch map_batch(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.is_cpu(), name, ": expected CPU maps [B, C, H, W]");
  return MapBatch{static_cast<char*>(t.data_ptr()),
                  t.size(0),
                  t.size(1),
                  t.size(2),
                  t.size(3),
                  {t.stride(0), t.stride(1), t.stride(2), t.stride(3)},
                  static_cast<int64_t>(t.element_size()),
                  is_channels_last(t)};
}

inline std::vector<MapBatch> map_batches(const std::vector<Tensor>& maps, const char* name) {
  std::vector<MapBatch> result;
  for (const Tensor& t : maps) {
    STD_TORCH_CHECK(t.scalar_type() == maps[0].scalar_type(), name, ": expected maps of one dtype");
    result.push_back(map_batch(t, name));
    STD_TORCH_CHECK(result.back().batch == result[0].batch && result.back().channels == result[0].channels, name,
                    ": expected maps of one batch size and channel count");
  }
  STD_TORCH_CHECK(!result.empty() && result.size() <= kMaxLevels, name, ": expected 1 to ", kMaxLevels, " maps");
  return result;
}

inline Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "maps: expected float32, float64, float16 or bfloat16");
  }
}

// In torch since 2.11; the libraries are built for 2.10, whose headers do not declare it and where it is null.
#if defined(__linux__)
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);
#endif

// An uninitialised map [B, C, H, W] of `like`'s dtype, in kept memory if it is large.
inline Tensor empty_in_kept_memory(const Tensor& like, const std::vector<int64_t>& shape, bool channels_last) {
#if defined(__linux__)
  size_t bytes = like.element_size();
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size >= 0, "shapes: expected no negative sizes, got ", size);
    bytes *= static_cast<size_t>(size);
  }
  const KeptBlock kept = bytes >= kHugePage && torch_from_blob ? take_kept(bytes) : KeptBlock{};
  if (kept.data) {
    const int64_t c = shape[1], h = shape[2], w = shape[3];
    const int64_t dense[] = {c * h * w, h * w, w, 1}, channels_inner[] = {h * w * c, 1, w * c, c};
    const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(like.scalar_type()));
    const auto give_back = [](void*, void* context) {
      auto* block = static_cast<KeptBlock*>(context);
      give_kept(*block);
      delete block;
    };
    auto block = std::make_unique<KeptBlock>(kept);
    AtenTensorHandle handle = nullptr;
    const AOTITorchError error = torch_from_blob(kept.data, 4, shape.data(), channels_last ? channels_inner : dense, 0,
                                                 dtype, aoti_torch_device_type_cpu(), -1, &handle,
                                                 aoti_torch_layout_strided(), nullptr, 0, give_back, block.get());
    STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "torch could not make a tensor of kept memory");
    block.release();
    return Tensor(handle);
  }
#endif
  return empty_map(like, shape, channels_last);
}

// Boxes as the Python layer hands them over: float64 [K, 5], contiguous. The layer has validated them with better
// messages where it could; under torch.compile it cannot look at values, so what memory safety needs is here.
struct Boxes {
  const double* data;
  int64_t count;
  std::vector<std::vector<int64_t>> of_image;  // rows by batch index, in order

  Boxes(const Tensor& t, int64_t batch) : data(nullptr), count(0), of_image(batch) {
    STD_TORCH_CHECK(
        t.dim() == 2 && t.size(1) == 5 && t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.is_cpu(),
        "boxes: expected contiguous float64 [K, 5] on the CPU");
    data = static_cast<const double*>(t.data_ptr());
    count = t.size(0);
    for (int64_t k = 0; k < count; ++k) {
      const double index = data[5 * k];
      STD_TORCH_CHECK(index >= 0 && index < static_cast<double>(batch) && index == std::floor(index),
                      "boxes: expected batch indices 0 to ", batch - 1, ", got ", index, " in row ", k);
      for (int i = 1; i < 5; ++i) {
        STD_TORCH_CHECK(std::isfinite(data[5 * k + i]), "boxes: expected finite coordinates, got ", data[5 * k + i],
                        " in row ", k);
      }
      STD_TORCH_CHECK(data[5 * k + 1] <= data[5 * k + 3] && data[5 * k + 2] <= data[5 * k + 4],
                      "boxes: expected x1 <= x2 and y1 <= y2 in row ", k);
      of_image[static_cast<size_t>(index)].push_back(k);
    }
  }
};

}  // namespace rakd
