// CPU ops align and align_backward: multi-level RoIAlign of all images and boxes.
#include "common.h"

namespace rakd {
namespace {

inline void run(const AlignTask<float>& task, Element element, Scratch& scratch) {
  best_kernels().align_float(task, element, scratch);
}
inline void run(const AlignTask<double>& task, Element element, Scratch& scratch) {
  best_kernels().align_double(task, element, scratch);
}
inline void run(const AlignBackwardTask<float>& task, Element element, Scratch& scratch) {
  best_kernels().align_backward_float(task, element, scratch);
}
inline void run(const AlignBackwardTask<double>& task, Element element, Scratch& scratch) {
  best_kernels().align_backward_double(task, element, scratch);
}

template <class T>
void align_forward(const std::vector<MapBatch>& maps, const Boxes& boxes, const DoubleList& strides,
                   const Options& options, Element element, void* output) {
  const int64_t levels = static_cast<int64_t>(maps.size()), batch = maps[0].batch, channels = maps[0].channels;
  const auto scales = level_scales(boxes, nullptr, strides, options.rule, 1.0);
  const auto plans = build_plans<T>(boxes, scales, strides, maps, options);
  std::vector<std::vector<const Plan<T>*>> plans_of(batch);
  std::vector<std::vector<ImageView>> views_of(batch);
  std::vector<Item> items;
  ScratchSizes sizes;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t pixels = 0, rows = 0;
    for (int64_t l = 0; l < levels; ++l) {
      const Plan<T>& plan = plans[l * batch + b];
      plans_of[b].push_back(&plan);
      views_of[b].push_back(maps[l].image(b));
      pixels += plan.pixels + kSlack;
      rows = std::max(rows, plan.rows);
    }
    if (boxes.of_image[b].empty()) continue;
    const int64_t width = block_width<T>(channels);
    append_blocks(items, 0, b, channels, width);
    ScratchSizes needed;
    needed.values[0] = pixels * width;
    needed.sums = rows * width;
    needed.pooled = (options.bins() + kSlack) * width;
    sizes.include(needed);
  }
  run_tasks<T>(static_cast<int64_t>(items.size()), sizes, [&](int64_t i, Scratch& scratch) {
    const Item& item = items[i];
    const auto& selected = boxes.of_image[item.image];
    const AlignTask<T> task{plans_of[item.image].data(),
                            views_of[item.image].data(),
                            levels,
                            selected.data(),
                            static_cast<int64_t>(selected.size()),
                            options.bins_y,
                            options.bins_x,
                            item.channels,
                            channels,
                            output};
    run(task, element, scratch);
  });
}

template <class T>
void align_gradient(const std::vector<MapBatch>& gradients, const Boxes& boxes, const DoubleList& strides,
                    const Options& options, Element element, const void* output_gradient) {
  const int64_t levels = static_cast<int64_t>(gradients.size()), batch = gradients[0].batch;
  const int64_t channels = gradients[0].channels;
  const auto scales = level_scales(boxes, nullptr, strides, options.rule, 1.0);
  const auto plans = build_plans<T>(boxes, scales, strides, gradients, options);
  std::vector<Item> items;
  ScratchSizes sizes;
  for (int64_t l = 0; l < levels; ++l) {
    if (!gradients[l].channels_last) continue;
    for (int64_t b = 0; b < batch; ++b) append_clearing(items, l, b, 0, gradients[l]);
  }
  for (int64_t l = 0; l < levels; ++l) {
    for (int64_t b = 0; b < batch; ++b) {
      const Plan<T>& plan = plans[l * batch + b];
      const int64_t width = block_width<T>(channels);
      append_blocks(items, l, b, channels, width);
      ScratchSizes needed;
      needed.gradients[0] = (plan.pixels + kSlack) * width;
      needed.sums = plan.rows * width;
      needed.pooled = (options.bins() + kSlack) * width;
      sizes.include(needed);
    }
  }
  run_tasks<T>(static_cast<int64_t>(items.size()), sizes, [&](int64_t i, Scratch& scratch) {
    const Item& item = items[i];
    const Plan<T>& plan = plans[item.level * batch + item.image];
    if (item.clear_side >= 0) {
      clear_untouched(plan, gradients[item.level], item.image, item);
      return;
    }
    const AlignBackwardTask<T> task{&plan,          gradients[item.level].image(item.image),
                                    options.bins_y, options.bins_x,
                                    item.channels,  channels,
                                    output_gradient};
    run(task, element, scratch);
  });
}

Tensor align(std::vector<Tensor> features, Tensor boxes, DoubleList strides, IntList output_size,
             int64_t sampling_ratio, int64_t assignment, double sigma, double canonical_size, double canonical_level) {
  const Options options(output_size, sampling_ratio, assignment, sigma, canonical_size, canonical_level);
  const auto maps = map_batches(features, "features");
  STD_TORCH_CHECK(maps.size() == strides.size(), "strides: expected one per map");
  const Boxes rows(boxes, maps[0].batch);
  const ScalarType type = features[0].scalar_type();
  Tensor output =
      empty_in_kept_memory(features[0], {rows.count, maps[0].channels, options.bins_y, options.bins_x}, false);
  const Element element = element_of(type);
  if (type == ScalarType::Double) {
    align_forward<double>(maps, rows, strides, options, element, output.data_ptr());
  } else {
    align_forward<float>(maps, rows, strides, options, element, output.data_ptr());
  }
  return output;
}

// `shapes` holds B, C, H, W of each level, `channels_last` the layout of each gradient.
std::vector<Tensor> align_backward(Tensor output_gradient, Tensor boxes, IntList shapes,
                                   std::vector<bool> channels_last, DoubleList strides, IntList output_size,
                                   int64_t sampling_ratio, int64_t assignment, double sigma, double canonical_size,
                                   double canonical_level) {
  const Options options(output_size, sampling_ratio, assignment, sigma, canonical_size, canonical_level);
  STD_TORCH_CHECK(shapes.size() == 4 * strides.size() && channels_last.size() == strides.size() && !strides.empty(),
                  "shapes: expected four numbers per map");
  std::vector<Tensor> gradients;
  for (size_t l = 0; l < strides.size(); ++l) {
    const std::vector<int64_t> shape(shapes.begin() + 4 * l, shapes.begin() + 4 * l + 4);
    gradients.push_back(empty_in_kept_memory(output_gradient, shape, channels_last[l]));
  }
  const auto maps = map_batches(gradients, "shapes");
  const Boxes rows(boxes, maps[0].batch);
  const Tensor dense = torch::stable::contiguous(output_gradient);
  STD_TORCH_CHECK(dense.dim() == 4 && dense.is_cpu() && dense.size(0) == rows.count &&
                      dense.size(1) == maps[0].channels && dense.size(2) == options.bins_y &&
                      dense.size(3) == options.bins_x,
                  "output_gradient: expected CPU [K, C, ", options.bins_y, ", ", options.bins_x, "]");
  const ScalarType type = output_gradient.scalar_type();
  const Element element = element_of(type);
  if (type == ScalarType::Double) {
    align_gradient<double>(maps, rows, strides, options, element, dense.data_ptr());
  } else {
    align_gradient<float>(maps, rows, strides, options, element, dense.data_ptr());
  }
  return gradients;
}

}  // namespace
}  // namespace rakd

STABLE_TORCH_LIBRARY_IMPL(rakd_ops, CPU, m) {
  m.impl("align", TORCH_BOX(&rakd::align));
  m.impl("align_backward", TORCH_BOX(&rakd::align_backward));
}
