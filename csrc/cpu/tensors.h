// Arguments of the CPU ops as the plans and kernels take them, and the tensors of their results.
#pragma once

#include "../arguments.h"
#include "kernels.h"

namespace rakd {

inline PlanOptions plan_options(const IntList& output_size, int64_t sampling_ratio) {
  check_sampling(output_size, sampling_ratio);
  return PlanOptions{output_size[0], output_size[1], sampling_ratio};
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
  const Number element = check_map(t, t, name);
  return MapBatch{static_cast<char*>(t.data_ptr()),
                  t.scalar_type(),
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
  check_maps(tensors, strides, tensors, name);
  Maps maps;
  for (const Tensor& t : tensors) maps.push_back(map_batch(t, name));
  return maps;
}

// Checks rows and index, the outputs of prepare_boxes.
inline BoxRows box_rows(const Tensor& rows, const Tensor& index, int64_t images, int64_t levels) {
  check_rows(rows, index, images, levels, rows);
  const int64_t count = rows.size(0);
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
      STD_TORCH_CHECK(std::all_of(row + 1, row + 5, is_finite_number) && row[1] <= row[3] && row[2] <= row[4],
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
  bool fits = true;
  for (size_t i = shape.size(); i-- > 0;) {
    STD_TORCH_CHECK(shape[i] >= 0, "shapes: expected no negative sizes, got ", shape[i]);
    strides[i] = values;
    fits = fits && !__builtin_mul_overflow(values, std::max<int64_t>(shape[i], 1), &values);
  }
  STD_TORCH_CHECK(fits && values <= INT64_MAX / 8, "shapes: expected a tensor of fewer than 2^60 values");
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
