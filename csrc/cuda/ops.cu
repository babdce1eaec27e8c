// The registered ops on CUDA tensors: checks, results, and launches on torch's stream.
#include <tuple>

#include "tensors.h"

namespace rakd {
namespace gpu {
namespace ops {

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

ScalarType accumulation_type(bool is_double) { return is_double ? ScalarType::Double : ScalarType::Float; }

std::tuple<Tensor, Tensor> prepare_boxes(Tensors boxes, std::optional<Tensor> box_weights,
                                         std::optional<Tensor> level_weights, int64_t images, bool mean,
                                         DoubleList strides, int64_t assignment, double sigma, double canonical_size,
                                         double canonical_level) {
  BoxArguments given(boxes, strides, assignment, sigma, canonical_size, canonical_level);
  given.add(boxes[0], box_weights, level_weights, images, mean);
  const int64_t count = given.boxes.total;
  const Stream on(boxes[0]);
  const Tensor rows = empty(boxes[0], {count, 5 + given.preparation.levels}, ScalarType::Double);
  const Tensor index = empty(boxes[0], {images + 1 + count}, ScalarType::Int);
  launch_prepare(given.preparation, given.boxes, static_cast<double*>(rows.data_ptr()),
                 static_cast<int32_t*>(index.data_ptr()), on.stream);
  RAKD_CHECK_LAUNCH();
  return {rows, index};
}

Tensor level_weights(Tensors boxes, DoubleList strides, int64_t assignment, double sigma, double canonical_size,
                     double canonical_level) {
  const BoxArguments given(boxes, strides, assignment, sigma, canonical_size, canonical_level);
  const bool is_double = boxes[0].scalar_type() == ScalarType::Double;
  const Stream on(boxes[0]);
  const Tensor weights = empty(boxes[0], {given.boxes.total, given.preparation.levels}, accumulation_type(is_double));
  with_accumulation_type(is_double, [&](auto zero) {
    launch_level_weights(given.preparation, given.boxes, static_cast<decltype(zero)*>(weights.data_ptr()), on.stream);
  });
  RAKD_CHECK_LAUNCH();
  return weights;
}

// The loss with the gradients that are wanted: total, losses (only without gradients), gradients.
std::tuple<Tensor, Tensor, Tensors> distill_as(const Tensors& apprentice, const Tensors& expert, const Tensor& rows,
                                               const Tensor& index, const std::optional<Tensor>& factor,
                                               const DoubleList& strides, const DoubleList& expert_strides,
                                               const IntList& output_size, int64_t sampling_ratio,
                                               const bool (&wanted)[2]) {
  Distillation call;
  call.map[0] = maps_of(apprentice, strides, apprentice, "apprentice");
  call.map[1] = maps_of(expert, expert_strides, apprentice, "expert");
  check_extents(apprentice, strides, expert, expert_strides);
  const Tensor& like = apprentice[0];
  bool is_double = false;
  for (const Maps& maps : call.map) {
    for (const Map& map : maps) is_double = is_double || map.type == Number::kDouble;
  }
  call.problem = make_problem(rows, index, like.size(0), like, strides, expert_strides, output_size, sampling_ratio);
  if (factor) {
    STD_TORCH_CHECK(factor->dim() == 0 || (factor->dim() == 1 && factor->size(0) == rows.size(0)),
                    "factor: expected one number or [", rows.size(0), "]");
    call.factor = numbers(*factor, like, "factor");
  }
  const Stream on(like);
  const ScalarType type = accumulation_type(is_double);
  const bool gradients = wanted[0] || wanted[1];
  const Tensor total = empty(like, {}, type), losses = empty(like, {gradients ? 0 : rows.size(0)}, type);
  Tensors made;
  for (int side = 0; side < 2; ++side) {
    if (!wanted[side]) continue;
    for (const Tensor& map : side == 0 ? apprentice : expert) {
      made.push_back(empty_map(map, {map.size(0), map.size(1), map.size(2), map.size(3)}, is_channels_last(map)));
      call.gradient[side].push_back(map_of(made.back(), "gradients"));
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
                                                output_size, sampling_ratio, {false, false});
  return {total, losses};
}

std::tuple<Tensor, Tensors> distill_gradient(Tensors apprentice, Tensors expert, Tensor rows, Tensor index,
                                             std::optional<Tensor> factor, DoubleList strides,
                                             DoubleList expert_strides, IntList output_size, int64_t sampling_ratio,
                                             bool apprentice_gradient, bool expert_gradient) {
  const auto [total, none, gradients] = distill_as(apprentice, expert, rows, index, factor, strides, expert_strides,
                                                   output_size, sampling_ratio, {apprentice_gradient, expert_gradient});
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
    const bool good = t.dim() == 4 && same_device(t, gradients[0]) && number_type(t, "gradients") <= Number::kBFloat16;
    STD_TORCH_CHECK(good && is_dense(t), "gradients: expected dense maps of one device");
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
  const Maps maps = maps_of(features, strides, features, "features");
  check_extents(features, strides, {}, {});
  const Tensor& like = features[0];
  for (const Tensor& t : features) {
    STD_TORCH_CHECK(t.size(1) == like.size(1) && t.scalar_type() == like.scalar_type(),
                    "features: expected maps of one dtype and channel count");
  }
  const Problem problem = make_problem(rows, index, like.size(0), like, strides, {}, output_size, sampling_ratio);
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
  const Problem problem =
      make_problem(rows, index, shapes[0], output_gradient, strides, {}, output_size, sampling_ratio);
  STD_TORCH_CHECK(output_gradient.dim() == 4 && output_gradient.size(0) == rows.size(0) &&
                      output_gradient.size(1) == shapes[1] && output_gradient.size(2) == output_size[0] &&
                      output_gradient.size(3) == output_size[1],
                  "output_gradient: expected [K, C, ", output_size[0], ", ", output_size[1], "]");
  const Stream on(output_gradient);
  const Tensor dense = torch::stable::contiguous(output_gradient);
  Tensors gradients;
  for (size_t l = 0; l < levels; ++l) {
    const IntList shape(shapes.begin() + 4 * l, shapes.begin() + 4 * l + 4);
    STD_TORCH_CHECK(shape[1] == shapes[1], "shapes: expected maps of one channel count");
    gradients.push_back(empty_map(dense, shape, channels_last[l]));
  }
  const Maps maps = maps_of(gradients, strides, gradients, "shapes");
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
