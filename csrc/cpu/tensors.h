// Reads the arguments of the CPU ops off torch tensors, with the checks that memory safety needs whoever calls (the
// Python layer has better messages and cannot look at values under torch.compile), and makes the tensors of their
// results.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

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

// A batch of maps of one level: [B, C, H, W] with any strides.
struct MapBatch {
  char* data;
  ScalarType type;
  Element element;
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
  MapBatch map{};
  map.data = static_cast<char*>(t.data_ptr());
  map.type = t.scalar_type();
  switch (map.type) {
    case ScalarType::Float:
      map.element = Element::kFloat;
      break;
    case ScalarType::Double:
      map.element = Element::kDouble;
      break;
    case ScalarType::Half:
      map.element = Element::kHalf;
      break;
    case ScalarType::BFloat16:
      map.element = Element::kBFloat16;
      break;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, float16 or bfloat16");
  }
  map.element_size = static_cast<int64_t>(t.element_size());
  int64_t* sizes[4] = {&map.batch, &map.channels, &map.height, &map.width};
  for (int i = 0; i < 4; ++i) {
    *sizes[i] = t.size(i);
    map.stride[i] = t.stride(i);
    STD_TORCH_CHECK(i == 0 || (*sizes[i] >= 1 && *sizes[i] <= kMaxCells), name,
                    ": expected at least one channel, row and column and fewer than 2^31 - 1, got ", *sizes[i],
                    " in dimension ", i);
  }
  map.channels_last = is_channels_last(t);
  return map;
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

// Numbers of any real dtype on the CPU.
inline Numbers numbers(const Tensor& t, const char* name) {
  Numbers result;
  switch (t.scalar_type()) {
#define RAKD_NUMBER(scalar, number) \
  case ScalarType::scalar:          \
    result.type = Number::number;   \
    break;
    RAKD_NUMBER(Float, kFloat)
    RAKD_NUMBER(Double, kDouble)
    RAKD_NUMBER(Half, kHalf)
    RAKD_NUMBER(BFloat16, kBFloat16)
    RAKD_NUMBER(Byte, kUInt8)
    RAKD_NUMBER(Char, kInt8)
    RAKD_NUMBER(Short, kInt16)
    RAKD_NUMBER(Int, kInt32)
    RAKD_NUMBER(Long, kInt64)
#undef RAKD_NUMBER
    default:
      STD_TORCH_CHECK(false, name, ": expected a floating-point or integer dtype");
  }
  STD_TORCH_CHECK(t.is_cpu() && t.dim() <= 2, name, ": expected a tensor on the CPU of at most two dimensions");
  static const double none = 0.0;  // where an empty tensor has no memory
  result.data = t.numel() > 0 ? t.data_ptr() : &none;
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

}  // namespace rakd
