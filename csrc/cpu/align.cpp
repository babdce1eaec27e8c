// CPU ops align and align_backward: multi-level RoIAlign of all images and boxes, and its transpose.
#include <cstring>

#include "tasks.h"

namespace rakd {
namespace {

template <class T>
std::vector<Plan<T>> plans_of(const Maps& maps, const BoxRows& boxes, const DoubleList& strides,
                              const PlanOptions& options) {
  std::vector<PlanLevel> levels;
  for (size_t l = 0; l < maps.size(); ++l) levels.push_back(PlanLevel{strides[l], maps[l].height, maps[l].width});
  return build_plans<T>(boxes, options, levels);
}

// Pooled values [K, C, bins_y, bins_x] as a map of K rows and of as many columns as there are bins.
ImageView view_of_pooled(const Tensor& pooled, Number element) {
  const int64_t bins = pooled.size(2) * pooled.size(3);
  return ImageView{pooled.data_ptr(), element, bins, pooled.size(1) * bins, 1};
}

template <class T>
void align_forward(const Maps& maps, const BoxRows& boxes, const DoubleList& strides, const PlanOptions& options,
                   const ImageView& output) {
  const int64_t levels = static_cast<int64_t>(maps.size()), batch = maps[0].batch, channels = maps[0].channels;
  const int64_t width = block_width<T>(channels), bins = options.bins();
  const auto plans = plans_of<T>(maps, boxes, strides, options);
  std::vector<ImageView> views(batch * levels);
  Work work;
  for (int64_t b = 0; b < batch; ++b) {
    if (boxes.begin[b] == boxes.begin[b + 1]) continue;
    int64_t values = 0;
    ScratchSizes sizes;
    for (int64_t l = 0; l < levels; ++l) {
      const Plan<T>& plan = plans[l * batch + b];
      views[b * levels + l] = maps[l].image(b);
      sizes.values[0] += (plan.cells + kSlack) * width;
      sizes.sums = std::max(sizes.sums, plan.rows * width);
      values += plan_values(plan, bins);
    }
    sizes.pooled = (bins + kSlack) * width;
    work.add_blocks(0, b, channels, width, values, sizes);
  }
  run_items<T>(work, [&](int64_t i, Scratch<T>& scratch) {
    const int64_t b = work.items[i].image;
    const int32_t *begin = boxes.order + boxes.begin[b], *end = boxes.order + boxes.begin[b + 1];
    const int64_t count = end - begin;
    const AlignTask<T> task{&plans[b], &views[b * levels],     batch, levels, begin, count,
                            bins,      work.items[i].channels, output};
    best_kernels<T>().align(task, scratch);
  });
}

template <class T>
void align_gradient(const Maps& gradients, const BoxRows& boxes, const DoubleList& strides, const PlanOptions& options,
                    const ImageView& output_gradient) {
  const int64_t levels = static_cast<int64_t>(gradients.size()), batch = gradients[0].batch;
  const int64_t channels = gradients[0].channels, width = block_width<T>(channels), bins = options.bins();
  const auto plans = plans_of<T>(gradients, boxes, strides, options);
  Work work;
  for (int64_t l = 0; l < levels; ++l) append_clearing(work, l, 0, gradients[l]);
  for (int64_t l = 0; l < levels; ++l) {
    for (int64_t b = 0; b < batch; ++b) {
      const Plan<T>& plan = plans[l * batch + b];
      ScratchSizes sizes;
      sizes.gradients[0] = (plan.cells + kSlack) * width;
      sizes.sums = plan.rows * width;
      sizes.pooled = (bins + kSlack) * width;
      const int64_t values = plan_values(plan, bins) + gradients[l].height * gradients[l].width;
      work.add_blocks(l, b, channels, width, values, sizes);
    }
  }
  run_items<T>(work, [&](int64_t i, Scratch<T>& scratch) {
    const Item& item = work.items[i];
    const Plan<T>& plan = plans[item.level * batch + item.image];
    const MapBatch& gradient = gradients[item.level];
    if (item.clear_side >= 0) return clear_outside_support(plan, gradient, item);
    const AlignBackwardTask<T> task{&plan, gradient.image(item.image), bins, item.channels, output_gradient};
    best_kernels<T>().align_backward(task, scratch);
  });
}

// `features`, or gradients of them.
void check_alike(const Maps& maps, const char* name) {
  for (const MapBatch& map : maps) {
    STD_TORCH_CHECK(map.channels == maps[0].channels && map.type == maps[0].type, name,
                    ": expected maps of one channel count and dtype");
  }
}

Tensor align(Tensors features, Tensor rows, Tensor index, DoubleList strides, IntList output_size,
             int64_t sampling_ratio) {
  check_environment();
  const PlanOptions options = plan_options(output_size, sampling_ratio);
  const Maps maps = map_batches(features, strides, "features");
  check_alike(maps, "features");
  check_extents(features, strides, {}, {});
  const int64_t batch = maps[0].batch;
  const BoxRows boxes = box_rows(rows, index, batch, static_cast<int64_t>(maps.size()));
  Tensor output = empty_tensor(maps[0].type, {boxes.count, maps[0].channels, options.bins_y, options.bins_x});
  // Boxes of no image.
  if (boxes.begin[batch] - boxes.begin[0] < boxes.count) {
    std::memset(output.data_ptr(), 0, output.numel() * maps[0].element_size);
  }
  const ImageView view = view_of_pooled(output, maps[0].element);
  if (maps[0].element == Number::kDouble) {
    align_forward<double>(maps, boxes, strides, options, view);
  } else {
    align_forward<float>(maps, boxes, strides, options, view);
  }
  return output;
}

// `shapes` holds B, C, H, W of each level, `channels_last` the layout of each gradient.
Tensors align_backward(Tensor output_gradient, Tensor rows, Tensor index, IntList shapes,
                       std::vector<bool> channels_last, DoubleList strides, IntList output_size,
                       int64_t sampling_ratio) {
  check_environment();
  const PlanOptions options = plan_options(output_size, sampling_ratio);
  STD_TORCH_CHECK(shapes.size() == 4 * strides.size() && channels_last.size() == strides.size(),
                  "shapes: expected four numbers per stride");
  Tensors gradients;
  for (size_t l = 0; l < strides.size(); ++l) {
    const IntList shape(shapes.begin() + 4 * l, shapes.begin() + 4 * l + 4);
    gradients.push_back(empty_tensor(output_gradient.scalar_type(), shape, channels_last[l]));
  }
  const Maps maps = map_batches(gradients, strides, "shapes");
  check_alike(maps, "shapes");
  const BoxRows boxes = box_rows(rows, index, maps[0].batch, static_cast<int64_t>(maps.size()));
  const Tensor dense = torch::stable::contiguous(output_gradient);
  STD_TORCH_CHECK(dense.dim() == 4 && dense.is_cpu() && dense.size(0) == boxes.count &&
                      dense.size(1) == maps[0].channels && dense.size(2) == options.bins_y &&
                      dense.size(3) == options.bins_x,
                  "output_gradient: expected CPU [", boxes.count, ", ", maps[0].channels, ", ", options.bins_y, ", ",
                  options.bins_x, "]");
  const ImageView view = view_of_pooled(dense, maps[0].element);
  if (maps[0].element == Number::kDouble) {
    align_gradient<double>(maps, boxes, strides, options, view);
  } else {
    align_gradient<float>(maps, boxes, strides, options, view);
  }
  return gradients;
}

}  // namespace
}  // namespace rakd

STABLE_TORCH_LIBRARY_IMPL(rakd_ops, CPU, m) {
  m.impl("align", TORCH_BOX(&rakd::align));
  m.impl("align_backward", TORCH_BOX(&rakd::align_backward));
}
