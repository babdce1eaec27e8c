// Arguments of the ops as both libraries read them off torch tensors, with the checks that memory safety needs whoever
// calls (the Python layer has better messages and cannot look at values under torch.compile).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <optional>

#include "prepare.h"

namespace rakd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using DoubleList = std::vector<double>;
using IntList = std::vector<int64_t>;

constexpr int64_t kMaxCount = 10000;  // bins and samples along one axis
// Boxes; channels, rows or columns of a map: counted in 32 bits, in blocks of up to 64 that may end beyond the last.
constexpr int64_t kMaxCells = (int64_t(1) << 31) - 64;

// The layout that gradients take after their map. rakd_ops/_layout.py states the same rule for fake tensors.
inline bool is_channels_last(const Tensor& t) { return t.stride(1) == 1 && t.size(1) > 1 && !t.is_contiguous(); }

// The dispatcher calls a library's op only if some tensor lies on its device, and the ops compare all with one.
inline bool same_device(const Tensor& t, const Tensor& like) { return t.device() == like.device(); }

inline Number number_type(const Tensor& t, const char* name) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::Half,  ScalarType::BFloat16,
                                   ScalarType::Byte,  ScalarType::Char,   ScalarType::Short, ScalarType::Int,
                                   ScalarType::Long};  // in the order of Number
  const auto* found = std::find(std::begin(kTypes), std::end(kTypes), t.scalar_type());
  STD_TORCH_CHECK(found != std::end(kTypes), name, ": expected floating-point numbers or integers");
  return static_cast<Number>(found - kTypes);
}

// Numbers [n] or [n, m]; none are read of an empty tensor.
inline Numbers numbers(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(same_device(t, like), name, ": expected a tensor on the device of the others");
  Numbers result{t.data_ptr(), number_type(t, name), {0, 0}};
  for (int64_t i = 0; i < t.dim() && i < 2; ++i) result.stride[i] = t.stride(i);
  return result;
}

// A map, or a gradient.
inline Number check_map(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && same_device(t, like) && t.size(0) == like.size(0), name,
                  ": expected maps [B, C, H, W] of one device and batch size");
  const Number type = number_type(t, name);
  STD_TORCH_CHECK(type <= Number::kBFloat16, name, ": expected float32, float64, float16 or bfloat16 maps");
  for (int i = 1; i < 4; ++i) {
    STD_TORCH_CHECK(t.size(i) >= 1 && t.size(i) <= kMaxCells, name,
                    ": expected 1 to 2^31 - 64 channels, rows and columns, got ", t.size(i), " in dimension ", i);
  }
  return type;
}

// One map per stride, fine to coarse; `like`: the same maps, or those that they are compared with.
inline void check_maps(const Tensors& maps, const DoubleList& strides, const Tensors& like, const char* name) {
  STD_TORCH_CHECK(!maps.empty() && maps.size() <= kMaxLevels && maps.size() == strides.size(), name, ": expected 1 to ",
                  kMaxLevels, " maps, one per stride, got ", maps.size(), " maps and ", strides.size(), " strides");
  STD_TORCH_CHECK(maps.size() == like.size(), name, ": expected ", like.size(), " maps as in apprentice, got ",
                  maps.size());
  for (size_t l = 0; l < maps.size(); ++l) {
    check_map(maps[l], like[0], name);
    STD_TORCH_CHECK(maps[l].size(1) == like[l].size(1), name, ": expected ", like[l].size(1),
                    " channels as in apprentice on level ", l, ", got ", maps[l].size(1));
  }
}

// Bounds on an image's height (dimension 2) or width (3), as maps of it imply them.
struct Extent {
  double low, high;
};

inline Extent extent_of(const Tensors& maps, const DoubleList& strides, int dimension) {
  Extent extent{0.0, INFINITY};
  for (size_t l = 0; l < maps.size(); ++l) {
    const auto cells = static_cast<double>(maps[l].size(dimension));
    extent = {std::max(extent.low, (cells - 1) * strides[l]), std::min(extent.high, (cells + 1) * strides[l])};
  }
  return extent;
}

// Sizes times strides belong to one image, up to padding: the rule of rakd_ops/_inputs.py, check_pyramid, for calls
// whose sizes torch.compile did not know. It does not see whether expert_strides were given: padding is always allowed.
// `others` may be empty.
inline void check_extents(const Tensors& maps, const DoubleList& strides, const Tensors& others,
                          const DoubleList& other_strides) {
  constexpr const char* kRule = ": expected strides that fit the maps (size times stride about the same for all maps)";
  for (const int dimension : {2, 3}) {
    const Extent own = extent_of(maps, strides, dimension);
    STD_TORCH_CHECK(own.low < own.high, "strides", kRule);
    if (others.empty()) continue;
    const Extent other = extent_of(others, other_strides, dimension);
    const double padding = std::max(strides.back(), other_strides.back());
    STD_TORCH_CHECK(other.low < other.high, "expert_strides", kRule);
    STD_TORCH_CHECK(std::max(own.low, other.low) < std::min(own.high, other.high) + padding, "expert_strides", kRule);
  }
}

inline void check_sampling(const IntList& output_size, int64_t sampling_ratio) {
  const auto good = [](int64_t n) { return n >= 1 && n <= kMaxCount; };
  STD_TORCH_CHECK(output_size.size() == 2 && good(output_size[0]) && good(output_size[1]),
                  "output_size: expected two numbers from 1 to ", kMaxCount);
  STD_TORCH_CHECK(sampling_ratio >= 0 && sampling_ratio <= kMaxCount, "sampling_ratio: expected a number from 0 to ",
                  kMaxCount, ", got ", sampling_ratio);
}

// The outputs of prepare_boxes.
inline void check_rows(const Tensor& rows, const Tensor& index, int64_t images, int64_t levels, const Tensor& like) {
  const auto good = [&](const Tensor& t, ScalarType type) {
    return t.scalar_type() == type && t.is_contiguous() && same_device(t, like);
  };
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == 5 + levels && good(rows, ScalarType::Double),
                  "rows: expected contiguous float64 [K, ", 5 + levels, "] on the maps' device");
  const int64_t count = rows.size(0), length = images + 1 + count;
  STD_TORCH_CHECK(images <= kMaxCells && count <= kMaxCells, "boxes: expected at most 2^31 - 64 boxes and images");
  STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == length && good(index, ScalarType::Int),
                  "index: expected contiguous int32 [", length, "], images + 1 + K, on the maps' device");
}

// Boxes, and what their rows are made from.
struct BoxArguments {
  BoxLists boxes;
  Preparation preparation{};  // of boxes of any image, without weights

  BoxArguments(const Tensors& tensors, const DoubleList& strides, int64_t assignment, double sigma,
               double canonical_size, double canonical_level) {
    STD_TORCH_CHECK(!tensors.empty(), "boxes: expected one tensor [K, 5] or one [K_b, 4] for each image, got none");
    boxes.whole = tensors.size() == 1 && tensors[0].dim() == 2 && tensors[0].size(1) == 5;
    for (const Tensor& t : tensors) {
      STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == (boxes.whole ? 5 : 4),
                      "boxes: expected one tensor [K, 5] or one [K_b, 4] for each image, got another shape");
      boxes.list.push_back(numbers(t, tensors[0], "boxes"));
      boxes.count.push_back(t.size(0));
      boxes.total += t.size(0);
    }
    STD_TORCH_CHECK(boxes.total <= kMaxCells, "boxes: expected at most 2^31 - 64, got ", boxes.total);
    STD_TORCH_CHECK(!strides.empty() && strides.size() <= kMaxLevels, "strides: expected 1 to ", kMaxLevels,
                    " numbers, got ", strides.size());
    STD_TORCH_CHECK(assignment >= 0 && assignment <= 2, "assignment: expected 0, 1 or 2, got ", assignment);
    STD_TORCH_CHECK(sigma > 0.0 && canonical_size > 0.0, "sigma, canonical_size: expected positive numbers, got ",
                    sigma, " and ", canonical_size);
    for (size_t l = 0; l < strides.size(); ++l) {
      STD_TORCH_CHECK(strides[l] > (l == 0 ? 0.0 : strides[l - 1]),
                      "strides: expected positive, increasing numbers, got ", strides[l], " in place ", l);
      preparation.level_of[l] = std::log2(strides[l]);
    }
    preparation.images = INT64_MAX;
    preparation.levels = static_cast<int32_t>(strides.size());
    preparation.rule = LevelRule{static_cast<Assignment>(assignment), sigma, canonical_size, canonical_level};
    preparation.factor = 1.0;
  }

  // The rest of a call of prepare_boxes. `like`: on the device of the boxes.
  void add(const Tensor& like, const std::optional<Tensor>& box_weights, const std::optional<Tensor>& level_weights,
           int64_t images, bool mean) {
    const int64_t count = boxes.total, levels = preparation.levels;
    STD_TORCH_CHECK(images >= 0 && images < kMaxCells - count, "images: expected 0 to 2^31 - K, got ", images);
    STD_TORCH_CHECK(boxes.whole || static_cast<int64_t>(boxes.list.size()) == images,
                    "boxes: expected one tensor for each of ", images, " images, got ", boxes.list.size());
    preparation.images = images;
    if (mean) preparation.factor = 1.0 / static_cast<double>(std::max<int64_t>(count, 1));
    if (box_weights) {
      STD_TORCH_CHECK(box_weights->dim() == 1 && box_weights->size(0) == count, "box_weights: expected [", count, "]");
      preparation.box_weights = numbers(*box_weights, like, "box_weights");
    }
    if (level_weights) {
      STD_TORCH_CHECK(level_weights->dim() == 2 && level_weights->size(0) == count && level_weights->size(1) == levels,
                      "level_weights: expected [", count, ", ", levels, "]");
      preparation.level_weights = numbers(*level_weights, like, "level_weights");
    }
  }
};

}  // namespace rakd
