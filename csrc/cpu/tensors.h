// Reads the arguments of the CPU ops off torch tensors, with the checks that memory safety needs whoever calls (the
// Python layer has better messages and cannot look at values under torch.compile), and makes the tensors of their
// results.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <vector>

#include "../maps.h"
#include "../prepare.h"
#include "kernels.h"

namespace rakd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using DoubleList = std::vector<double>;
using IntList = std::vector<int64_t>;

constexpr int64_t kMaxCount = 10000;                   // bins and samples along one axis
constexpr int64_t kMaxCells = (int64_t(1) << 31) - 2;  // rows or columns of a map; the tables count in 32 bits

inline PlanOptions plan_options(const IntList& output_size, int64_t sampling_ratio) {
  const auto good = [](int64_t n) { return n >= 1 && n <= kMaxCount; };
  STD_TORCH_CHECK(output_size.size() == 2 && good(output_size[0]) && good(output_size[1]),
                  "output_size: expected two numbers from 1 to ", kMaxCount);
  STD_TORCH_CHECK(sampling_ratio >= 0 && sampling_ratio <= kMaxCount, "sampling_ratio: expected a number from 0 to ",
                  kMaxCount, ", got ", sampling_ratio);
  return PlanOptions{output_size[0], output_size[1], sampling_ratio};
}

inline Number number_type(ScalarType type, const char* name) {
  constexpr ScalarType kTypes[] = {ScalarType::Float,    ScalarType::Double, ScalarType::Half,
                                   ScalarType::BFloat16, ScalarType::Byte,   ScalarType::Char,
                                   ScalarType::Short,    ScalarType::Int,    ScalarType::Long};  // in Number's order
  const auto* found = std::find(std::begin(kTypes), std::end(kTypes), type);
  STD_TORCH_CHECK(found != std::end(kTypes), name, ": expected a floating-point or integer dtype");
  return static_cast<Number>(found - kTypes);
}

// A batch of maps of one level: [B, C, H, W] with any strides.
struct MapBatch {
  char* data;
  ScalarType type;
  Number element;
  int64_t element_size;  // bytes
  int64_t batch, channels, height, width;
  int64_t stride[4];  // elements
  bool channels_last;

  ImageView image(int64_t b) const {
    return ImageView{data + b * stride[0] * element_size, element, stride[1], stride[2], stride[3]};
  }
};
using Maps = std::vector<MapBatch>;

inline MapBatch map_batch(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.is_cpu(), name, ": expected CPU maps [B, C, H, W]");
  const ScalarType type = t.scalar_type();
  const Number element = number_type(type, name);
  STD_TORCH_CHECK(element <= Number::kBFloat16, name, ": expected float32, float64, float16 or bfloat16");
  for (int i = 1; i < 4; ++i) {
    STD_TORCH_CHECK(t.size(i) >= 1 && t.size(i) <= kMaxCells, name,
                    ": expected 1 to 2^31 - 2 channels, rows and columns, got ", t.size(i), " in dimension ", i);
  }
  return MapBatch{static_cast<char*>(t.data_ptr()),
                  type,
                  element,
                  static_cast<int64_t>(t.element_size()),
                  t.size(0),
                  t.size(1),
                  t.size(2),
                  t.size(3),
                  {t.stride(0), t.stride(1), t.stride(2), t.stride(3)},
                  is_channels_last(t)};
}

// One map per stride, fine to coarse.
inline Maps map_batches(const Tensors& tensors, const DoubleList& strides, const char* name) {
  STD_TORCH_CHECK(!tensors.empty() && tensors.size() <= kMaxLevels && tensors.size() == strides.size(), name,
                  ": expected 1 to ", kMaxLevels, " maps, one per stride, got ", tensors.size(), " maps and ",
                  strides.size(), " strides");
  Maps maps;
  maps.reserve(tensors.size());
  for (const Tensor& t : tensors) {
    maps.push_back(map_batch(t, name));
    STD_TORCH_CHECK(maps.back().batch == maps[0].batch, name, ": expected maps of one batch size");
  }
  return maps;
}

// [n] or [n, m] numbers of any real dtype.
inline Numbers numbers(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() <= 2, name, ": expected a CPU tensor of at most two dimensions");
  static const double none = 0.0;  // for an empty tensor, which has no memory
  Numbers result{t.numel() > 0 ? t.data_ptr() : &none, number_type(t.scalar_type(), name), {}};
  for (int64_t i = 0; i < t.dim(); ++i) result.stride[i] = t.stride(i);
  return result;
}

// Checks rows and index, the outputs of prepare_boxes.
inline BoxRows box_rows(const Tensor& rows, const Tensor& index, int64_t images, int64_t levels) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == 5 + levels && rows.scalar_type() == ScalarType::Double &&
                      rows.is_contiguous() && rows.is_cpu(),
                  "rows: expected contiguous float64 [K, ", 5 + levels, "] on the CPU");
  const int64_t count = rows.size(0);
  STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == images + 1 + count && index.scalar_type() == ScalarType::Int &&
                      index.is_contiguous() && index.is_cpu(),
                  "index: expected contiguous int32 [", images + 1 + count, "], images + 1 + K, on the CPU");
  const auto* begin = static_cast<const int32_t*>(index.data_ptr());
  const BoxRows boxes{static_cast<const double*>(rows.data_ptr()), begin, begin + images + 1, count, images, levels};
  STD_TORCH_CHECK(begin[0] >= 0, "index: expected no negative number, got ", begin[0]);
  for (int64_t b = 0; b < images; ++b) {
    STD_TORCH_CHECK(begin[b] <= begin[b + 1] && begin[b + 1] <= count, "index: expected the boxes of image ", b,
                    " to end between ", begin[b], " and ", count, ", got ", begin[b + 1]);
    int64_t previous = -1;
    for (int32_t i = begin[b]; i < begin[b + 1]; ++i) {
      const int64_t k = boxes.order[i];
      STD_TORCH_CHECK(k > previous && k < count, "index: expected increasing box numbers below ", count,
                      " in each image, got ", k, " after ", previous);
      const double* row = boxes.row(k);
      STD_TORCH_CHECK(row[0] == static_cast<double>(b), "rows: expected image ", b, " as in index, got ", row[0],
                      " in row ", k);
      const bool finite =
          row[1] - row[1] == 0.0 && row[2] - row[2] == 0.0 && row[3] - row[3] == 0.0 && row[4] - row[4] == 0.0;
      STD_TORCH_CHECK(finite && row[1] <= row[3] && row[2] <= row[4],
                      "rows: expected finite numbers with x1 <= x2 and y1 <= y2 in row ", k);
      previous = k;
    }
  }
  return boxes;
}

// An uninitialised dense CPU tensor [shape], in cached memory if it is large; a map may be channels-last.
inline Tensor empty_tensor(ScalarType type, const IntList& shape, bool channels_last = false) {
  IntList strides(shape.size());
  int64_t values = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    STD_TORCH_CHECK(shape[i] >= 0, "shapes: expected no negative sizes, got ", shape[i]);
    strides[i] = values;
    values *= std::max<int64_t>(shape[i], 1);
  }
  if (channels_last) strides = {strides[0], 1, shape[3] * shape[1], shape[1]};
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const size_t bytes = static_cast<size_t>(values) * aoti_torch_dtype_element_size(dtype);
  const auto dimensions = static_cast<int64_t>(shape.size());
  AtenTensorHandle handle = tensor_in_cached_memory(bytes, dimensions, shape.data(), strides.data(), dtype);
  if (!handle) {
    STD_TORCH_CHECK(aoti_torch_empty_strided(dimensions, shape.data(), strides.data(), dtype,
                                             aoti_torch_device_type_cpu(), -1, &handle) == AOTI_TORCH_SUCCESS,
                    "torch could not allocate ", bytes, " bytes");
  }
  return Tensor(handle);
}

// The same, filled; float32 or float64.
inline Tensor tensor_of(ScalarType type, const IntList& shape, const double* values) {
  Tensor t = empty_tensor(type, shape);
  const int64_t count = t.numel();
  if (type == ScalarType::Double) {
    std::copy_n(values, count, static_cast<double*>(t.data_ptr()));
  } else {
    std::copy_n(values, count, static_cast<float*>(t.data_ptr()));
  }
  return t;
}

}  // namespace rakd
