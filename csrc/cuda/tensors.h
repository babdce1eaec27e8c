// What the registered CUDA ops share: torch tensors as the kernels want them, options, and the workspace.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "launch.h"
#include "torch_platform.h"

namespace rakd {
namespace gpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using DoubleList = std::vector<double>;
using IntList = std::vector<int64_t>;

template <class U>
Tensor buffer(const Tensor& like, int64_t count, ScalarType type, U** pointer) {
  Tensor t = torch::stable::empty({count}, type, std::nullopt, like.device());
  *pointer = count > 0 ? static_cast<U*>(t.data_ptr()) : nullptr;
  return t;
}

template <class T>
constexpr ScalarType scalar_type_of() {
  return sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
}

struct Options {
  IntList output_size;
  int64_t sampling_ratio;
  LevelRule rule;
};

inline Options make_options(const IntList& output_size, int64_t sampling_ratio, int64_t assignment, double sigma,
                            double canonical_size, double canonical_level) {
  STD_TORCH_CHECK(output_size.size() == 2 && output_size[0] > 0 && output_size[1] > 0,
                  "output_size: expected two positive numbers");
  STD_TORCH_CHECK(output_size[0] <= INT32_MAX / output_size[1], "output_size: expected fewer than 2^31 bins, got ",
                  output_size[0], " x ", output_size[1]);
  STD_TORCH_CHECK(assignment >= 0 && assignment <= 2, "assignment: expected 0, 1 or 2");
  return Options{output_size, sampling_ratio,
                 LevelRule{static_cast<Assignment>(assignment), sigma, canonical_size, canonical_level}};
}

// Shapes [B, C, H, W] of a pyramid's maps, one after another.
inline IntList shapes_of(const std::vector<Tensor>& maps, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(!maps.empty() && maps.size() <= kMaxLevels, name, ": expected 1 to ", kMaxLevels, " maps");
  IntList shapes;
  for (const Tensor& t : maps) {
    STD_TORCH_CHECK(t.dim() == 4 && is_on_device(t) && t.get_device_index() == like.get_device_index() &&
                        t.scalar_type() == like.scalar_type() && t.size(0) == like.size(0) && t.size(1) == like.size(1),
                    name, ": expected CUDA maps [B, C, H, W] of one device, dtype, batch size and channel count");
    for (int64_t i = 0; i < 4; ++i) shapes.push_back(t.size(i));
  }
  return shapes;
}

// Kernels hold the strides of rows and columns, and what lies in a row, in 32 bits.
inline void check_strides(const Tensor& map) {
  const bool apart = map.size(2) == 1 || map.stride(2) <= INT32_MAX;
  STD_TORCH_CHECK(apart && (map.size(3) - 1) * map.stride(3) <= INT32_MAX,
                  "maps: expected rows less than 2^31 elements long and apart, got strides ", map.stride(2), " and ",
                  map.stride(3), " for ", map.size(3), " columns");
}

template <class E>
Pyramid<E> pyramid(const std::vector<Tensor>& maps) {
  Pyramid<E> result{};
  for (size_t l = 0; l < maps.size(); ++l) {
    check_strides(maps[l]);
    result.level[l].data = static_cast<E*>(maps[l].data_ptr());
    for (int i = 0; i < 4; ++i) result.level[l].stride[i] = maps[l].stride(i);
  }
  return result;
}

// Tables and the memory they live in. The tensors go back to torch's allocator when this does, which keeps the memory
// from other streams' hands until the kernels launched here are done, as for any tensor.
template <class T>
struct Workspace {
  Tables<T> tables{};
  std::vector<Tensor> memory;

  // `other_shapes` and `other_strides`: the expert's where they differ, else nullptr.
  Workspace(const Tensor& like, const Tensor& boxes, const IntList& shapes, const IntList* other_shapes,
            const DoubleList& strides, const DoubleList* other_strides, const Options& options, double factor,
            const double* coefficients) {
    STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5 && boxes.scalar_type() == ScalarType::Double &&
                        boxes.is_contiguous() && is_on_device(boxes) &&
                        boxes.get_device_index() == like.get_device_index(),
                    "boxes: expected contiguous float64 [K, 5] on the maps' device");
    STD_TORCH_CHECK(4 * strides.size() == shapes.size(), "strides: expected one per map");
    tables.boxes = boxes.size(0);
    STD_TORCH_CHECK(tables.boxes <= INT32_MAX, "boxes: expected fewer than 2^31, got ", tables.boxes);
    tables.levels = static_cast<int32_t>(strides.size());
    tables.sides = other_shapes ? 2 : 1;
    tables.images = static_cast<int32_t>(shapes[0]);
    tables.bins[0] = static_cast<int32_t>(options.output_size[0]);
    tables.bins[1] = static_cast<int32_t>(options.output_size[1]);
    tables.sampling_ratio = static_cast<int32_t>(options.sampling_ratio);
    tables.rule = options.rule;
    tables.factor = factor;
    for (int level = 0; level < tables.levels; ++level) {
      tables.level_of[level] = std::log2(strides[level]);
      for (int side = 0; side < tables.sides; ++side) {
        tables.stride[side][level] = side == 0 ? strides[level] : (*other_strides)[level];
        for (int axis = 0; axis < 2; ++axis) {
          const int64_t size = (side == 0 ? shapes : *other_shapes)[4 * level + 2 + axis];
          STD_TORCH_CHECK(size > 0 && size < INT32_MAX, "maps: expected 1 to 2^31 - 2 rows and columns, got ", size);
          tables.size[side][level][axis] = static_cast<int32_t>(size);
        }
      }
    }
    tables.rows = static_cast<const double*>(boxes.data_ptr());
    tables.coefficients = coefficients;
  }

  // Before anything is launched. `all_levels`: see plan_workspace().
  void allocate(const Tensor& like, Keep keep, bool all_levels) {
    const WorkspaceSizes sizes = plan_workspace(tables, keep, all_levels, BlockSizes{});
    STD_TORCH_CHECK(sizes.room <= kMaxRoom, "maps: too many rows and columns for the tables of one box");
    memory.push_back(buffer(like, sizes.ints, ScalarType::Int, &tables.ints));
    memory.push_back(buffer(like, sizes.weights, scalar_type_of<T>(), &tables.weights));
    int32_t* feeds = nullptr;
    memory.push_back(
        buffer(like, sizes.feeds * static_cast<int64_t>(sizeof(Feed<T>) / sizeof(int32_t)), ScalarType::Int, &feeds));
    tables.feeds = reinterpret_cast<Feed<T>*>(feeds);
    memory.push_back(buffer(like, sizes.extents, ScalarType::Int, &tables.extents));
    memory.push_back(buffer(like, sizes.scales, ScalarType::Double, &tables.scales));
  }
};

// Whether a map's elements fill its memory, in one of the layouts that gradients have.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const int64_t channels = t.size(1), row = t.size(3) * channels;
  return t.stride(1) == 1 && (t.size(3) == 1 || t.stride(3) == channels) && (t.size(2) == 1 || t.stride(2) == row) &&
         (t.size(0) == 1 || t.stride(0) == t.size(2) * row);
}

// Refuses gradients of more tiles than a grid has blocks.
inline void check_tiles(const IntList& shapes) {
  int64_t tiles = 0;
  for (size_t i = 0; i < shapes.size(); i += 4) {
    tiles += tile_count(shapes[i], shapes[i + 2], shapes[i + 3], BlockSizes{}.spread / 32, kTileColumns);
  }
  STD_TORCH_CHECK(tiles <= kMaxTiles, "maps: too many images, rows and columns for one call");
}

// Calls f<E>(arguments) for the dtype's element type.
#define RAKD_DISPATCH(type, f, ...)                                                   \
  switch (type) {                                                                     \
    case ScalarType::Float:                                                           \
      f<float>(__VA_ARGS__);                                                          \
      break;                                                                          \
    case ScalarType::Double:                                                          \
      f<double>(__VA_ARGS__);                                                         \
      break;                                                                          \
    case ScalarType::Half:                                                            \
      f<__half>(__VA_ARGS__);                                                         \
      break;                                                                          \
    case ScalarType::BFloat16:                                                        \
      f<__nv_bfloat16>(__VA_ARGS__);                                                  \
      break;                                                                          \
    default:                                                                          \
      STD_TORCH_CHECK(false, "maps: expected float32, float64, float16 or bfloat16"); \
  }

}  // namespace gpu
}  // namespace rakd
