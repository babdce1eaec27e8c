// The registered ops on CUDA tensors: reads tensors, allocates results and workspace, launches on torch's stream.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "../maps.h"
#include "launch_gram.h"
#include "tensors.h"

namespace rakd {
namespace gpu {
namespace {

struct Distillation {
  const std::vector<Tensor>&apprentice, &expert;
  const Tensor &boxes, &coefficients;
  const DoubleList &strides, &expert_strides;
  Options options;
  bool gradient[2];
  Form form;
};

struct Losses {
  Tensor total, per_box;  // the latter is left unwritten where gradients are asked for
  std::vector<Tensor> gradients;
};

// RAKD_CUDA_FORM: for tests and measurements.
Form form_of_environment() {
  const char* value = std::getenv("RAKD_CUDA_FORM");
  const std::string form = value ? value : "";
  STD_TORCH_CHECK(form.empty() || form == "pooled" || form == "gram",
                  "RAKD_CUDA_FORM: expected pooled, gram or nothing, got ", form);
  return form.empty() ? Form::kByShape : form == "pooled" ? Form::kPooled : Form::kGram;
}

// Adds the gradients that are asked for to the results, unwritten.
template <class E>
void make_gradients(const Distillation& call, Losses& out, Pyramid<E> (&gradient)[2]) {
  for (int side = 0; side < 2; ++side) {
    if (!call.gradient[side]) continue;
    std::vector<Tensor> maps;
    for (const Tensor& map : side == 0 ? call.apprentice : call.expert) {
      maps.push_back(empty_map(map, {map.size(0), map.size(1), map.size(2), map.size(3)}, is_channels_last(map)));
      out.gradients.push_back(maps.back());
    }
    gradient[side] = pyramid<E>(maps);
  }
}

template <class E, class T>
void distill_gram(const Distillation& call, Workspace<T>& workspace, GramTables<T>& gram, const GramSizes& sizes,
                  Losses& out, cudaStream_t stream) {
  const Tensor& like = call.apprentice[0];
  workspace.allocate(like, Keep::kExtents, false);
  gram.extents = workspace.tables.extents;
  gram.scales = workspace.tables.scales;
  const Tensor ints = buffer(like, sizes.ints, ScalarType::Int, &gram.ints);
  const Tensor values = buffer(like, sizes.values, scalar_type_of<T>(), &gram.values);
  GramGradient<E> gradient{};
  gradient.tables = gram;
  gradient.map[0] = pyramid<const E>(call.apprentice);
  gradient.map[1] = pyramid<const E>(call.expert);
  gradient.channels = static_cast<int32_t>(like.size(1));
  const int64_t blocks = gram_blocks(gram, gradient.channels, BlockSizes{});
  const Tensor partial = buffer(like, blocks, ScalarType::Double, &gradient.partial);
  const Tensor finished = buffer(like, 1, ScalarType::Int, &gradient.finished);
  gradient.total = static_cast<double*>(out.total.data_ptr());
  make_gradients(call, out, gradient.gradient);
  launch_make_gram(workspace.tables, gram, gradient.finished, BlockSizes{}, stream);
  RAKD_CHECK_LAUNCH();
  launch_gram_gradient(gradient, BlockSizes{}, stream);
  RAKD_CHECK_LAUNCH();
}

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
                         static_cast<const double*>(call.coefficients.data_ptr()));
  if (gradients && shared) {
    GramTables<T> gram{};
    const GramSizes sizes = plan_gram(gram, workspace.tables);
    if (choose_gram(call.form, gram, sizes, static_cast<int64_t>(bins), shapes[1], BlockSizes{})) {
      distill_gram<E>(call, workspace, gram, sizes, out, stream);
      return;
    }
  }
  workspace.allocate(like, gradients ? Keep::kForGradients : Keep::kNone, false);
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
    RAKD_CHECK_LAUNCH();
  }
  const SumLosses<double> sum{pool.partial, tables.boxes, tables.levels * division.groups,
                              static_cast<double*>(out.per_box.data_ptr()), static_cast<double*>(out.total.data_ptr())};
  if (!gradients) {
    launch_sum_losses(sum, BlockSizes{}, stream);
    RAKD_CHECK_LAUNCH();
    return;
  }
  check_tiles(shapes);
  if (!shared) check_tiles(expert_shapes);
  Spread<E> spread{};
  spread.tables = tables;
  make_gradients(call, out, spread.gradient);
  spread.channels = pool.channels;
  spread.pooled = pool.pooled;
  spread.sum = sum;
  launch_spread(spread, BlockSizes{}, stream);
  RAKD_CHECK_LAUNCH();
}

Losses distill(const Distillation& call) {
  const Tensor& like = call.apprentice.at(0);
  const IntList shapes = shapes_of(call.apprentice, "apprentice", like);
  const IntList expert_shapes = shapes_of(call.expert, "expert", like);
  STD_TORCH_CHECK(shapes.size() == expert_shapes.size() && 4 * call.expert_strides.size() == shapes.size(),
                  "expert: expected as many maps and strides as apprentice");
  STD_TORCH_CHECK(call.coefficients.dim() == 1 && call.coefficients.size(0) == call.boxes.size(0) &&
                      call.coefficients.scalar_type() == ScalarType::Double && call.coefficients.is_contiguous() &&
                      is_on_device(call.coefficients),
                  "coefficients: expected contiguous float64 [K] on the maps' device");
  const DeviceGuard guard(like.get_device_index());
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
  Losses out = distill(
      {apprentice, expert, boxes, coefficients, strides, expert_strides, options, {false, false}, Form::kPooled});
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
                        {apprentice_gradient, expert_gradient},
                        form_of_environment()});
  return {out.total, out.gradients};
}

template <class E>
void scale_as(const std::vector<Tensor>& gradients, const Tensor& factor, cudaStream_t stream) {
  typedef typename Accumulator<E>::type T;
  STD_TORCH_CHECK(is_on_device(factor) && factor.get_device_index() == gradients[0].get_device_index() &&
                      factor.dim() == 0 && factor.scalar_type() == scalar_type_of<T>(),
                  "factor: expected one number in the loss's dtype on the gradients' device");
  Scale<E> call{};
  call.factor = static_cast<const T*>(factor.data_ptr());
  for (size_t i = 0; i < gradients.size(); ++i) {
    call.data[i] = static_cast<E*>(gradients[i].data_ptr());
    call.count[i] = gradients[i].numel();
  }
  launch_scale(call, static_cast<int>(gradients.size()), stream);
  RAKD_CHECK_LAUNCH();
}

void scale_gradients(std::vector<Tensor> gradients, Tensor factor) {
  STD_TORCH_CHECK(!gradients.empty() && gradients.size() <= kMostScaled, "gradients: expected 1 to ", kMostScaled,
                  " maps");
  const Tensor& like = gradients[0];
  for (const Tensor& t : gradients) {
    const bool same = t.dim() == 4 && is_on_device(t) && t.get_device_index() == like.get_device_index() &&
                      t.scalar_type() == like.scalar_type();
    STD_TORCH_CHECK(same && is_dense(t), "gradients: expected dense CUDA maps of one device and dtype");
  }
  const DeviceGuard guard(like.get_device_index());
  const cudaStream_t stream = current_stream(like.get_device_index());
  RAKD_DISPATCH(like.scalar_type(), scale_as, gradients, factor, stream);
}

template <class E>
void align_as(const std::vector<Tensor>& features, const IntList& shapes, const Tensor& boxes,
              const DoubleList& strides, const Options& options, const Tensor& output, cudaStream_t stream) {
  typedef typename Accumulator<E>::type T;
  Workspace<T> workspace(features[0], boxes, shapes, nullptr, strides, nullptr, options, 1.0, nullptr);
  workspace.allocate(features[0], Keep::kNone, true);
  if (workspace.tables.boxes == 0) return;
  AlignPool<E> pool{};
  pool.tables = workspace.tables;
  pool.map = pyramid<const E>(features);
  pool.channels = static_cast<int32_t>(shapes[1]);
  pool.output = static_cast<E*>(output.data_ptr());
  launch_align_pool(pool, BlockSizes{}, stream);
  RAKD_CHECK_LAUNCH();
}

template <class E>
void align_backward_as(const Tensor& output_gradient, const std::vector<Tensor>& gradients, const IntList& shapes,
                       const Tensor& boxes, const DoubleList& strides, const Options& options, cudaStream_t stream) {
  typedef typename Accumulator<E>::type T;
  Workspace<T> workspace(output_gradient, boxes, shapes, nullptr, strides, nullptr, options, 1.0, nullptr);
  workspace.allocate(output_gradient, Keep::kForGradients, false);
  check_tiles(shapes);
  if (workspace.tables.boxes > 0) {
    launch_tables(workspace.tables, BlockSizes{}, stream);
    RAKD_CHECK_LAUNCH();
  }
  Spread<E> spread{};
  spread.tables = workspace.tables;
  spread.gradient[0] = pyramid<E>(gradients);
  spread.channels = static_cast<int32_t>(shapes[1]);
  spread.output_gradient = static_cast<const E*>(output_gradient.data_ptr());
  launch_spread(spread, BlockSizes{}, stream);
  RAKD_CHECK_LAUNCH();
}

Tensor align(std::vector<Tensor> features, Tensor boxes, DoubleList strides, IntList output_size,
             int64_t sampling_ratio, int64_t assignment, double sigma, double canonical_size, double canonical_level) {
  const Options options = make_options(output_size, sampling_ratio, assignment, sigma, canonical_size, canonical_level);
  const Tensor& like = features.at(0);
  const IntList shapes = shapes_of(features, "features", like);
  const DeviceGuard guard(like.get_device_index());
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
  const DeviceGuard guard(output_gradient.get_device_index());
  const cudaStream_t stream = current_stream(output_gradient.get_device_index());
  const Tensor dense = torch::stable::contiguous(output_gradient);
  STD_TORCH_CHECK(dense.dim() == 4 && is_on_device(dense) && dense.size(0) == boxes.size(0) &&
                      dense.size(1) == shapes[1] && dense.size(2) == output_size[0] && dense.size(3) == output_size[1],
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

STABLE_TORCH_LIBRARY_IMPL(RAKD_OPS, RAKD_DEVICE, m) {
  m.impl("distill_loss", TORCH_BOX(&rakd::gpu::distill_loss));
  m.impl("distill_gradient", TORCH_BOX(&rakd::gpu::distill_gradient));
  m.impl("scale_gradients", TORCH_BOX(&rakd::gpu::scale_gradients));
  m.impl("align", TORCH_BOX(&rakd::gpu::align));
  m.impl("align_backward", TORCH_BOX(&rakd::gpu::align_backward));
}
