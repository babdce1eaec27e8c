// The registered ops on CUDA tensors: reads tensors, allocates results and workspace, launches on torch's stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "../maps.h"
#include "launch.h"

namespace rakd {
namespace gpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using DoubleList = std::vector<double>;
using IntList = std::vector<int64_t>;

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

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

Options make_options(const IntList& output_size, int64_t sampling_ratio, int64_t assignment, double sigma,
                     double canonical_size, double canonical_level) {
  STD_TORCH_CHECK(output_size.size() == 2 && output_size[0] > 0 && output_size[1] > 0,
                  "output_size: expected two positive numbers");
  STD_TORCH_CHECK(assignment >= 0 && assignment <= 2, "assignment: expected 0, 1 or 2");
  return Options{output_size, sampling_ratio,
                 LevelRule{static_cast<Assignment>(assignment), sigma, canonical_size, canonical_level}};
}

// Shapes [B, C, H, W] of a pyramid's maps, one after another.
IntList shapes_of(const std::vector<Tensor>& maps, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(!maps.empty() && maps.size() <= kMaxLevels, name, ": expected 1 to ", kMaxLevels, " maps");
  IntList shapes;
  for (const Tensor& t : maps) {
    STD_TORCH_CHECK(t.dim() == 4 && t.is_cuda() && t.get_device_index() == like.get_device_index() &&
                        t.scalar_type() == like.scalar_type() && t.size(0) == like.size(0) && t.size(1) == like.size(1),
                    name, ": expected CUDA maps [B, C, H, W] of one device, dtype, batch size and channel count");
    for (int64_t i = 0; i < 4; ++i) shapes.push_back(t.size(i));
  }
  return shapes;
}

template <class E>
Pyramid<E> pyramid(const std::vector<Tensor>& maps) {
  Pyramid<E> result{};
  for (size_t l = 0; l < maps.size(); ++l) {
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
  WorkspaceSizes sizes;
  std::vector<Tensor> memory;

  // `other_shapes` and `other_strides`: the expert's where they differ, else nullptr. `all_levels`: see
  // plan_workspace().
  Workspace(const Tensor& like, const Tensor& boxes, const IntList& shapes, const IntList* other_shapes,
            const DoubleList& strides, const DoubleList* other_strides, const Options& options, double factor,
            const double* coefficients, Keep keep, bool all_levels) {
    STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5 && boxes.scalar_type() == ScalarType::Double &&
                        boxes.is_contiguous() && boxes.is_cuda() && boxes.get_device_index() == like.get_device_index(),
                    "boxes: expected contiguous float64 [K, 5] on the maps' device");
    STD_TORCH_CHECK(4 * strides.size() == shapes.size(), "strides: expected one per map");
    tables.boxes = boxes.size(0);
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
    sizes = plan_workspace(tables, keep, all_levels, BlockSizes{});
    STD_TORCH_CHECK(sizes.room <= kMaxRoom, "maps: too many rows and columns for the tables of one box");
    memory.push_back(buffer(like, sizes.ints, ScalarType::Int, &tables.ints));
    memory.push_back(buffer(like, sizes.weights, scalar_type_of<T>(), &tables.weights));
    memory.push_back(buffer(like, sizes.extents, ScalarType::Int, &tables.extents));
    memory.push_back(buffer(like, sizes.scales, ScalarType::Double, &tables.scales));
  }
};

// Refuses gradients of more tiles than a grid has blocks.
void check_tiles(const IntList& shapes) {
  int64_t tiles = 0;
  for (size_t i = 0; i < shapes.size(); i += 4) tiles += tile_count(shapes[i], shapes[i + 2], shapes[i + 3], {});
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

struct Distillation {
  const std::vector<Tensor>&apprentice, &expert;
  const Tensor &boxes, &coefficients;
  const DoubleList &strides, &expert_strides;
  Options options;
  bool gradient[2];
};

struct Losses {
  Tensor total, per_box;
  std::vector<Tensor> gradients;
};

template <class E>
void distill_as(const Distillation& call, const IntList& shapes, const IntList& expert_shapes, Losses& out,
                cudaStream_t stream) {
  typedef typename Accumulator<E>::type T;
  const Tensor& like = call.apprentice[0];
  bool shared = call.strides == call.expert_strides;
  for (size_t i = 0; i < shapes.size(); ++i) shared = shared && shapes[i] == expert_shapes[i];
  const double bins = static_cast<double>(call.options.output_size[0] * call.options.output_size[1]);
  const double factor = 1.0 / (static_cast<double>(shapes[1]) * bins);
  const bool gradients = call.gradient[0] || call.gradient[1];
  Workspace<T> workspace(like, call.boxes, shapes, shared ? nullptr : &expert_shapes, call.strides,
                         &call.expert_strides, call.options, factor,
                         static_cast<const double*>(call.coefficients.data_ptr()),
                         gradients ? Keep::kForGradients : Keep::kNone, false);
  const Tables<T>& tables = workspace.tables;
  const int64_t entries = tables.boxes * tables.levels;
  const Division division = divide(tables, entries, shapes[1]);
  DistillPool<E> pool{};
  pool.tables = tables;
  pool.map[0] = pyramid<const E>(call.apprentice);
  pool.map[1] = pyramid<const E>(call.expert);
  pool.channels = static_cast<int32_t>(shapes[1]);
  const Tensor partial = buffer(like, entries * division.groups, ScalarType::Double, &pool.partial);
  const int64_t values = entries * slabs_of(shapes[1]) * kSlab * tables.bins[0] * tables.bins[1];
  const Tensor pooled = buffer(like, gradients ? values : 0, scalar_type_of<T>(), &pool.pooled);
  if (entries > 0) {
    launch_distill_pool(pool, division, BlockSizes{}, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const SumLosses<double> sum{pool.partial, tables.boxes, tables.levels * division.groups,
                              static_cast<double*>(out.per_box.data_ptr()), static_cast<double*>(out.total.data_ptr())};
  if (!gradients) {
    launch_sum_losses(sum, BlockSizes{}, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  check_tiles(shapes);
  if (!shared) check_tiles(expert_shapes);
  Spread<E> spread{};
  spread.tables = tables;
  for (int side = 0; side < 2; ++side) {
    if (!call.gradient[side]) continue;
    std::vector<Tensor> written;
    for (const Tensor& map : side == 0 ? call.apprentice : call.expert) {
      written.push_back(empty_map(map, {map.size(0), map.size(1), map.size(2), map.size(3)}, is_channels_last(map)));
      out.gradients.push_back(written.back());
    }
    spread.gradient[side] = pyramid<E>(written);
  }
  spread.channels = pool.channels;
  spread.pooled = pool.pooled;
  spread.sum = sum;
  launch_spread(spread, BlockSizes{}, stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Losses distill(const Distillation& call) {
  const Tensor& like = call.apprentice.at(0);
  const IntList shapes = shapes_of(call.apprentice, "apprentice", like);
  const IntList expert_shapes = shapes_of(call.expert, "expert", like);
  STD_TORCH_CHECK(shapes.size() == expert_shapes.size() && 4 * call.expert_strides.size() == shapes.size(),
                  "expert: expected as many maps and strides as apprentice");
  STD_TORCH_CHECK(call.coefficients.dim() == 1 && call.coefficients.size(0) == call.boxes.size(0) &&
                      call.coefficients.scalar_type() == ScalarType::Double && call.coefficients.is_contiguous() &&
                      call.coefficients.is_cuda(),
                  "coefficients: expected contiguous float64 [K] on the maps' device");
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const cudaStream_t stream = current_stream(like.get_device_index());
  Losses out{torch::stable::empty({}, ScalarType::Double, std::nullopt, like.device()),
             torch::stable::empty({call.boxes.size(0)}, ScalarType::Double, std::nullopt, like.device()),
             {}};
  RAKD_DISPATCH(like.scalar_type(), distill_as, call, shapes, expert_shapes, out, stream);
  return out;
}

std::tuple<Tensor, Tensor> distill_loss(std::vector<Tensor> apprentice, std::vector<Tensor> expert, Tensor boxes,
                                        Tensor coefficients, DoubleList strides, DoubleList expert_strides,
                                        IntList output_size, int64_t sampling_ratio, int64_t assignment, double sigma,
                                        double canonical_size, double canonical_level) {
  const Options options = make_options(output_size, sampling_ratio, assignment, sigma, canonical_size, canonical_level);
  Losses out = distill({apprentice, expert, boxes, coefficients, strides, expert_strides, options, {false, false}});
  return {out.total, out.per_box};
}

std::tuple<Tensor, std::vector<Tensor>> distill_gradient(std::vector<Tensor> apprentice, std::vector<Tensor> expert,
                                                         Tensor boxes, Tensor coefficients, DoubleList strides,
                                                         DoubleList expert_strides, IntList output_size,
                                                         int64_t sampling_ratio, int64_t assignment, double sigma,
                                                         double canonical_size, double canonical_level,
                                                         bool apprentice_gradient, bool expert_gradient) {
  const Options options = make_options(output_size, sampling_ratio, assignment, sigma, canonical_size, canonical_level);
  Losses out = distill({apprentice,
                        expert,
                        boxes,
                        coefficients,
                        strides,
                        expert_strides,
                        options,
                        {apprentice_gradient, expert_gradient}});
  return {out.total, out.gradients};
}

template <class E>
void align_as(const std::vector<Tensor>& features, const IntList& shapes, const Tensor& boxes,
              const DoubleList& strides, const Options& options, const Tensor& output, cudaStream_t stream) {
  typedef typename Accumulator<E>::type T;
  Workspace<T> workspace(features[0], boxes, shapes, nullptr, strides, nullptr, options, 1.0, nullptr, Keep::kNone,
                         true);
  if (workspace.tables.boxes == 0) return;
  AlignPool<E> pool{};
  pool.tables = workspace.tables;
  pool.map = pyramid<const E>(features);
  pool.channels = static_cast<int32_t>(shapes[1]);
  pool.output = static_cast<E*>(output.data_ptr());
  launch_align_pool(pool, BlockSizes{}, stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class E>
void align_backward_as(const Tensor& output_gradient, const std::vector<Tensor>& gradients, const IntList& shapes,
                       const Tensor& boxes, const DoubleList& strides, const Options& options, cudaStream_t stream) {
  typedef typename Accumulator<E>::type T;
  Workspace<T> workspace(output_gradient, boxes, shapes, nullptr, strides, nullptr, options, 1.0, nullptr,
                         Keep::kForGradients, false);
  check_tiles(shapes);
  if (workspace.tables.boxes > 0) {
    launch_tables(workspace.tables, BlockSizes{}, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  Spread<E> spread{};
  spread.tables = workspace.tables;
  spread.gradient[0] = pyramid<E>(gradients);
  spread.channels = static_cast<int32_t>(shapes[1]);
  spread.output_gradient = static_cast<const E*>(output_gradient.data_ptr());
  launch_spread(spread, BlockSizes{}, stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor align(std::vector<Tensor> features, Tensor boxes, DoubleList strides, IntList output_size,
             int64_t sampling_ratio, int64_t assignment, double sigma, double canonical_size, double canonical_level) {
  const Options options = make_options(output_size, sampling_ratio, assignment, sigma, canonical_size, canonical_level);
  const Tensor& like = features.at(0);
  const IntList shapes = shapes_of(features, "features", like);
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const cudaStream_t stream = current_stream(like.get_device_index());
  Tensor output = empty_map(like, {boxes.size(0), shapes[1], output_size[0], output_size[1]}, false);
  RAKD_DISPATCH(like.scalar_type(), align_as, features, shapes, boxes, strides, options, output, stream);
  return output;
}

std::vector<Tensor> align_backward(Tensor output_gradient, Tensor boxes, IntList shapes,
                                   std::vector<bool> channels_last, DoubleList strides, IntList output_size,
                                   int64_t sampling_ratio, int64_t assignment, double sigma, double canonical_size,
                                   double canonical_level) {
  const Options options = make_options(output_size, sampling_ratio, assignment, sigma, canonical_size, canonical_level);
  STD_TORCH_CHECK(shapes.size() == 4 * strides.size() && channels_last.size() == strides.size() && !strides.empty() &&
                      strides.size() <= kMaxLevels,
                  "shapes: expected four numbers per map");
  const torch::stable::accelerator::DeviceGuard guard(output_gradient.get_device_index());
  const cudaStream_t stream = current_stream(output_gradient.get_device_index());
  const Tensor dense = torch::stable::contiguous(output_gradient);
  STD_TORCH_CHECK(dense.dim() == 4 && dense.is_cuda() && dense.size(0) == boxes.size(0) && dense.size(1) == shapes[1] &&
                      dense.size(2) == output_size[0] && dense.size(3) == output_size[1],
                  "output_gradient: expected CUDA [K, C, ", output_size[0], ", ", output_size[1], "]");
  std::vector<Tensor> gradients;
  for (size_t l = 0; l < strides.size(); ++l) {
    gradients.push_back(empty_map(dense, {shapes.begin() + 4 * l, shapes.begin() + 4 * l + 4}, channels_last[l]));
  }
  RAKD_DISPATCH(dense.scalar_type(), align_backward_as, dense, gradients, shapes, boxes, strides, options, stream);
  return gradients;
}

}  // namespace
}  // namespace gpu
}  // namespace rakd

STABLE_TORCH_LIBRARY_IMPL(rakd_ops, CUDA, m) {
  m.impl("distill_loss", TORCH_BOX(&rakd::gpu::distill_loss));
  m.impl("distill_gradient", TORCH_BOX(&rakd::gpu::distill_gradient));
  m.impl("align", TORCH_BOX(&rakd::gpu::align));
  m.impl("align_backward", TORCH_BOX(&rakd::gpu::align_backward));
}
