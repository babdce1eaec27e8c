// The registered ops on CUDA tensors: checks, results, and launches on torch's stream.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <tuple>

#include "tensors.h"

namespace rakd {
namespace gpu {
namespace ops {

using Tensors = std::vector<Tensor>;

// Torch's stream of a tensor's device, which is the current one meanwhile.
struct Stream {
  DeviceGuard guard;
  cudaStream_t stream;

  explicit Stream(const Tensor& like)
      : guard(like.get_device_index()), stream(current_stream(like.get_device_index())) {}
};

Tensor empty(const Tensor& like, const IntList& shape, ScalarType type) {
  return torch::stable::empty(shape, type, std::nullopt, like.device());
}

// RAKD_CUDA_FORM: for tests and measurements.
Algorithm algorithm_of_environment() {
  const char* value = std::getenv("RAKD_CUDA_FORM");
  const std::string form = value ? value : "";
  STD_TORCH_CHECK(form.empty() || form == "pooled" || form == "gram",
                  "RAKD_CUDA_FORM: expected pooled, gram or nothing, got ", form);
  return form.empty() ? Algorithm::kByShape : form == "pooled" ? Algorithm::kPooled : Algorithm::kGram;
}

// Boxes as the caller has them, and the rule of their levels.
struct Boxes {
  BoxLists lists{};
  PrepareBoxes call{};

  Boxes(const Tensors& boxes, const DoubleList& strides, int64_t assignment, double sigma, double canonical_size,
        double canonical_level) {
    STD_TORCH_CHECK(!boxes.empty(), "boxes: expected one tensor [K, 5] or one [K_b, 4] for each image, got none");
    STD_TORCH_CHECK(!strides.empty() && strides.size() <= kMaxLevels, "strides: expected 1 to ", kMaxLevels,
                    " numbers, got ", strides.size());
    STD_TORCH_CHECK(assignment >= 0 && assignment <= 2, "assignment: expected 0, 1 or 2, got ", assignment);
    lists.whole = boxes[0].dim() == 2 && boxes[0].size(1) == 5;
    const int64_t columns = lists.whole ? 5 : 4;
    STD_TORCH_CHECK(!lists.whole || boxes.size() == 1, "boxes: expected one tensor [K, 5], got ", boxes.size());
    for (const Tensor& t : boxes) {
      STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == columns,
                      "boxes: expected one tensor [K, 5] or one [K_b, 4] for each image");
      lists.list.push_back(numbers(t, boxes[0], "boxes"));
      lists.count.push_back(t.size(0));
      call.boxes += t.size(0);
    }
    STD_TORCH_CHECK(call.boxes < INT32_MAX, "boxes: expected fewer than 2^31 boxes, got ", call.boxes);
    Preparation& preparation = call.preparation;
    preparation.levels = static_cast<int32_t>(strides.size());
    preparation.rule = LevelRule{static_cast<Assignment>(assignment), sigma, canonical_size, canonical_level};
    for (size_t l = 0; l < strides.size(); ++l) preparation.level_of[l] = std::log2(strides[l]);
    preparation.images = INT64_MAX;
    preparation.factor = 1.0;
  }
};

std::tuple<Tensor, Tensor> prepare_boxes(Tensors boxes, std::optional<Tensor> box_weights,
                                         std::optional<Tensor> level_weights, int64_t images, bool mean,
                                         DoubleList strides, int64_t assignment, double sigma, double canonical_size,
                                         double canonical_level) {
  Boxes given(boxes, strides, assignment, sigma, canonical_size, canonical_level);
  PrepareBoxes& call = given.call;
  Preparation& preparation = call.preparation;
  const int64_t count = call.boxes, levels = preparation.levels;
  STD_TORCH_CHECK(images >= 0 && images < INT32_MAX - 1 - count, "images: expected 0 to 2^31 - K, got ", images);
  STD_TORCH_CHECK(given.lists.whole || given.lists.list.size() == static_cast<size_t>(images),
                  "boxes: expected one tensor for each of ", images, " images, got ", boxes.size());
  preparation.images = images;
  if (mean) preparation.factor = 1.0 / static_cast<double>(count > 0 ? count : 1);
  if (box_weights) {
    STD_TORCH_CHECK(box_weights->dim() == 1 && box_weights->size(0) == count, "box_weights: expected [", count, "]");
    preparation.box_weights = numbers(*box_weights, boxes[0], "box_weights");
  }
  if (level_weights) {
    STD_TORCH_CHECK(level_weights->dim() == 2 && level_weights->size(0) == count && level_weights->size(1) == levels,
                    "level_weights: expected [", count, ", ", levels, "]");
    preparation.level_weights = numbers(*level_weights, boxes[0], "level_weights");
  }
  const Stream on(boxes[0]);
  const Tensor rows = empty(boxes[0], {count, 5 + levels}, ScalarType::Double);
  const Tensor index = empty(boxes[0], {images + 1 + count}, ScalarType::Int);
  call.rows = static_cast<double*>(rows.data_ptr());
  call.index = static_cast<int32_t*>(index.data_ptr());
  launch_prepare(call, given.lists, on.stream);
  RAKD_CHECK_LAUNCH();
  return {rows, index};
}

Tensor level_weights(Tensors boxes, DoubleList strides, int64_t assignment, double sigma, double canonical_size,
                     double canonical_level) {
  const Boxes given(boxes, strides, assignment, sigma, canonical_size, canonical_level);
  const bool is_double = boxes[0].scalar_type() == ScalarType::Double;
  const Stream on(boxes[0]);
  const Tensor weights = empty(boxes[0], {given.call.boxes, given.call.preparation.levels},
                               is_double ? ScalarType::Double : ScalarType::Float);
  with_accumulation_type(is_double, [&](auto zero) {
    launch_level_weights(given.call, given.lists, static_cast<decltype(zero)*>(weights.data_ptr()), on.stream);
  });
  RAKD_CHECK_LAUNCH();
  return weights;
}

// The loss with the gradients that are wanted: total, losses (only without gradients), gradients.
std::tuple<Tensor, Tensor, Tensors> distill_as(const Tensors& apprentice, const Tensors& expert, const Tensor& rows,
                                               const Tensor& index, const std::optional<Tensor>& factor,
                                               const DoubleList& strides, const DoubleList& expert_strides,
                                               const IntList& output_size, int64_t sampling_ratio,
                                               const bool (&wanted)[2], Algorithm algorithm) {
  STD_TORCH_CHECK(!apprentice.empty(), "apprentice: expected 1 to ", kMaxLevels, " maps, got 0");
  STD_TORCH_CHECK(apprentice[0].dim() == 4, "apprentice: expected maps [B, C, H, W]");
  const Tensor& like = apprentice[0];
  Distillation call;
  call.map[0] = map_views(apprentice, like, "apprentice");
  call.map[1] = map_views(expert, like, "expert");
  STD_TORCH_CHECK(apprentice.size() == expert.size() && expert_strides.size() == expert.size(),
                  "expert: expected as many maps and strides as apprentice");
  STD_TORCH_CHECK(strides.size() == apprentice.size(), "strides: expected one per map");
  bool is_double = false;
  for (size_t l = 0; l < expert.size(); ++l) {
    STD_TORCH_CHECK(expert[l].size(1) == apprentice[l].size(1), "expert: expected ", apprentice[l].size(1),
                    " channels on level ", l, " as apprentice, got ", expert[l].size(1));
    for (const Maps& maps : call.map) is_double = is_double || maps[l].type == Number::kDouble;
  }
  call.problem = make_problem(rows, index, like.size(0), like, strides, output_size, sampling_ratio);
  call.problem.strides[1] = expert_strides;
  call.algorithm = algorithm;
  if (factor) {
    STD_TORCH_CHECK(factor->dim() == 0 || (factor->dim() == 1 && factor->size(0) == rows.size(0)),
                    "factor: expected one number or [", rows.size(0), "]");
    call.factor = numbers(*factor, like, "factor");
  }
  const Stream on(like);
  const ScalarType type = is_double ? ScalarType::Double : ScalarType::Float;
  const bool gradients = wanted[0] || wanted[1];
  const Tensor total = empty(like, {}, type), losses = empty(like, {gradients ? 0 : rows.size(0)}, type);
  Tensors made;
  for (int side = 0; side < 2; ++side) {
    if (!wanted[side]) continue;
    for (const Tensor& map : side == 0 ? apprentice : expert) {
      made.push_back(empty_map(map, {map.size(0), map.size(1), map.size(2), map.size(3)}, is_channels_last(map)));
      call.gradient[side].push_back(map_view(made.back(), "gradients"));
    }
  }
  call.total = total.data_ptr();
  call.losses = gradients ? nullptr : losses.data_ptr();
  Workspace workspace(like);
  with_accumulation_type(is_double,
                         [&](auto zero) { distill<decltype(zero)>(workspace, call, BlockSizes{}, on.stream); });
  RAKD_CHECK_LAUNCH();
  return {total, losses, made};
}

std::tuple<Tensor, Tensor> distill_loss(Tensors apprentice, Tensors expert, Tensor rows, Tensor index,
                                        DoubleList strides, DoubleList expert_strides, IntList output_size,
                                        int64_t sampling_ratio) {
  const auto [total, losses, none] = distill_as(apprentice, expert, rows, index, std::nullopt, strides, expert_strides,
                                                output_size, sampling_ratio, {false, false}, Algorithm::kPooled);
  return {total, losses};
}

std::tuple<Tensor, Tensors> distill_gradient(Tensors apprentice, Tensors expert, Tensor rows, Tensor index,
                                             std::optional<Tensor> factor, DoubleList strides,
                                             DoubleList expert_strides, IntList output_size, int64_t sampling_ratio,
                                             bool apprentice_gradient, bool expert_gradient) {
  const auto [total, none, gradients] =
      distill_as(apprentice, expert, rows, index, factor, strides, expert_strides, output_size, sampling_ratio,
                 {apprentice_gradient, expert_gradient}, algorithm_of_environment());
  return {total, gradients};
}

void scale_gradients(Tensors gradients, Tensor factor) {
  STD_TORCH_CHECK(!gradients.empty() && gradients.size() <= kMaxScaled, "gradients: expected 1 to ", kMaxScaled,
                  " maps");
  const bool is_double = factor.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(same_device(factor, gradients[0]) && factor.dim() == 0 &&
                      (is_double || factor.scalar_type() == ScalarType::Float),
                  "factor: expected one float32 or float64 number on the gradients' device");
  for (const Tensor& t : gradients) {
    const bool good = t.dim() == 4 && same_device(t, gradients[0]) && is_floating(number_type(t, "gradients"));
    STD_TORCH_CHECK(good && is_dense(t), "gradients: expected dense CUDA maps of one device");
    STD_TORCH_CHECK(is_double || t.scalar_type() != ScalarType::Double,
                    "factor: expected float64 as some gradients are, got float32");
  }
  const Stream on(gradients[0]);
  with_accumulation_type(is_double, [&](auto zero) {
    ScaleGradients<decltype(zero)> call{};
    call.factor = static_cast<const decltype(zero)*>(factor.data_ptr());
    for (size_t i = 0; i < gradients.size(); ++i) {
      call.data[i] = gradients[i].data_ptr();
      call.type[i] = number_type(gradients[i], "gradients");
      call.count[i] = gradients[i].numel();
    }
    launch_scale(call, static_cast<int>(gradients.size()), on.stream);
  });
  RAKD_CHECK_LAUNCH();
}

Tensor align(Tensors features, Tensor rows, Tensor index, DoubleList strides, IntList output_size,
             int64_t sampling_ratio) {
  STD_TORCH_CHECK(!features.empty() && features[0].dim() == 4, "features: expected 1 to ", kMaxLevels,
                  " maps [B, C, H, W]");
  const Tensor& like = features[0];
  const Maps maps = map_views(features, like, "features");
  STD_TORCH_CHECK(strides.size() == features.size(), "strides: expected one per map");
  for (const Tensor& t : features) {
    STD_TORCH_CHECK(t.size(1) == like.size(1) && t.scalar_type() == like.scalar_type(),
                    "features: expected maps of one dtype and channel count");
  }
  const Problem problem = make_problem(rows, index, like.size(0), like, strides, output_size, sampling_ratio);
  const Stream on(like);
  const Tensor output = empty_map(like, {rows.size(0), like.size(1), output_size[0], output_size[1]}, false);
  Workspace workspace(like);
  with_accumulation_type(like.scalar_type() == ScalarType::Double, [&](auto zero) {
    gpu::align<decltype(zero)>(workspace, problem, maps, output.data_ptr(), BlockSizes{}, on.stream);
  });
  RAKD_CHECK_LAUNCH();
  return output;
}

Tensors align_backward(Tensor output_gradient, Tensor rows, Tensor index, IntList shapes,
                       std::vector<bool> channels_last, DoubleList strides, IntList output_size,
                       int64_t sampling_ratio) {
  const size_t levels = strides.size();
  STD_TORCH_CHECK(shapes.size() == 4 * levels && channels_last.size() == levels && levels > 0 && levels <= kMaxLevels,
                  "shapes: expected four numbers per map");
  STD_TORCH_CHECK(is_on_device(output_gradient), "output_gradient: expected a CUDA tensor");
  const Stream on(output_gradient);
  const Tensor dense = torch::stable::contiguous(output_gradient);
  const Problem problem = make_problem(rows, index, shapes[0], dense, strides, output_size, sampling_ratio);
  STD_TORCH_CHECK(dense.dim() == 4 && dense.size(0) == rows.size(0) && dense.size(1) == shapes[1] &&
                      dense.size(2) == output_size[0] && dense.size(3) == output_size[1],
                  "output_gradient: expected CUDA [K, C, ", output_size[0], ", ", output_size[1], "]");
  Tensors gradients;
  Maps maps;
  for (size_t l = 0; l < levels; ++l) {
    const IntList shape(shapes.begin() + 4 * l, shapes.begin() + 4 * l + 4);
    STD_TORCH_CHECK(shape[0] == shapes[0] && shape[1] == shapes[1],
                    "shapes: expected maps of one batch size and channel count");
    gradients.push_back(empty_map(dense, shape, channels_last[l]));
    maps.push_back(map_view(gradients.back(), "shapes"));
  }
  Workspace workspace(dense);
  gpu::align_backward(workspace, problem, dense.data_ptr(), maps, BlockSizes{}, on.stream);
  RAKD_CHECK_LAUNCH();
  return gradients;
}

}  // namespace ops
}  // namespace gpu
}  // namespace rakd

STABLE_TORCH_LIBRARY_IMPL(RAKD_OPS, RAKD_DEVICE, m) {
  m.impl("prepare_boxes", TORCH_BOX(&rakd::gpu::ops::prepare_boxes));
  m.impl("level_weights", TORCH_BOX(&rakd::gpu::ops::level_weights));
  m.impl("distill_loss", TORCH_BOX(&rakd::gpu::ops::distill_loss));
  m.impl("distill_gradient", TORCH_BOX(&rakd::gpu::ops::distill_gradient));
  m.impl("scale_gradients", TORCH_BOX(&rakd::gpu::ops::scale_gradients));
  m.impl("align", TORCH_BOX(&rakd::gpu::ops::align));
  m.impl("align_backward", TORCH_BOX(&rakd::gpu::ops::align_backward));
}
