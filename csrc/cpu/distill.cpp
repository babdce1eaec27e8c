// CPU ops distill_loss and distill_gradient: the distillation loss of all levels, images and boxes.
#include "common.h"

namespace rakd {
namespace {

struct Distillation {
  const std::vector<Tensor>&apprentice, &expert;
  const Tensor &boxes, &coefficients;
  const DoubleList &strides, &expert_strides;
  const Options& options;
  bool per_box;
  bool gradient[2];
};

struct Result {
  double total = 0.0;
  DoubleList box_losses;
  std::vector<Tensor> gradients;  // apprentice's, then expert's, where wanted
};

inline void run(DistillTask<float>& task, Element element, Scratch& scratch) {
  best_kernels().distill_float(task, element, scratch);
}
inline void run(DistillTask<double>& task, Element element, Scratch& scratch) {
  best_kernels().distill_double(task, element, scratch);
}

template <class T>
class Job {
 public:
  Job(const Distillation& call, const Boxes& boxes, const std::vector<MapBatch>& apprentice,
      const std::vector<MapBatch>& expert)
      : call_(call), boxes_(boxes), maps_{apprentice, expert} {
    const Options& options = call.options;
    levels_ = static_cast<int64_t>(apprentice.size());
    batch_ = apprentice[0].batch;
    for (int64_t l = 0; l < levels_; ++l) {
      shared_.push_back(apprentice[l].height == expert[l].height && apprentice[l].width == expert[l].width &&
                        call.strides[l] == call.expert_strides[l]);
    }
    const double factor = 1.0 / static_cast<double>(apprentice[0].channels * options.bins());
    const auto scales = level_scales(boxes, static_cast<const double*>(call.coefficients.data_ptr()), call.strides,
                                     options.rule, factor);
    // The Gram operator is of the difference of two maps, so it needs maps of one shape, and sums over the boxes.
    gradients_wanted_ = call.gradient[0] || call.gradient[1];
    plans_[0] = build_plans<T>(boxes, scales, call.strides, apprentice, options,
                               call.per_box ? std::vector<bool>() : shared_, gradients_wanted_);
    if (std::find(shared_.begin(), shared_.end(), false) != shared_.end()) {
      plans_[1] = build_plans<T>(boxes, scales, call.expert_strides, expert, options);
    }
  }

  Result run_all() {
    Result result;
    allocate(result);
    append_items();
    ScratchSizes sizes;
    for (const Item& item : items_) {
      if (item.clear_side < 0) sizes.include(scratch_sizes(item));
    }
    std::vector<double> totals(items_.size(), 0.0);
    std::vector<DoubleList> patch_losses(items_.size());
    if (call_.per_box) {
      for (size_t i = 0; i < items_.size(); ++i) {
        if (items_[i].clear_side < 0) patch_losses[i].resize(plan(0, items_[i]).patch_count);
      }
    }
    const Element element = element_of(call_.apprentice[0].scalar_type());
    run_tasks<T>(static_cast<int64_t>(items_.size()), sizes, [&](int64_t i, Scratch& scratch) {
      const Item& item = items_[i];
      if (item.clear_side >= 0) {
        const int64_t side = shared_[item.level] ? 0 : item.clear_side;
        clear_untouched(plan(side, item), gradients_[item.clear_side][item.level], item.image, item);
        return;
      }
      DistillTask<T> task = make_task(item);
      task.patch_losses = call_.per_box ? patch_losses[i].data() : nullptr;
      run(task, element, scratch);
      totals[i] = task.total;
    });
    // Fixed order: the same bits whoever ran what.
    for (const double total : totals) result.total += total;
    // Half an inner product may round to just below zero, which a sum of squares never is.
    const auto* weight = static_cast<const double*>(call_.coefficients.data_ptr());
    const bool squares = std::all_of(weight, weight + boxes_.count, [](double w) { return w >= 0.0; });
    if (squares && result.total < 0.0) result.total = 0.0;
    if (call_.per_box) sum_box_losses(patch_losses, result);
    return result;
  }

 private:
  static constexpr int64_t kMostWideScratch = int64_t(11) << 19;  // bytes, per thread

  const Plan<T>& plan(int side, const Item& item) const { return plans_[side][item.level * batch_ + item.image]; }

  void allocate(Result& result) {
    for (int side = 0; side < 2; ++side) {
      if (!call_.gradient[side]) continue;
      for (int64_t l = 0; l < levels_; ++l) {
        const MapBatch& map = maps_[side][l];
        const std::vector<int64_t> shape{map.batch, map.channels, map.height, map.width};
        result.gradients.push_back(empty_in_kept_memory(call_.apprentice[0], shape, map.channels_last));
        gradients_[side].push_back(map_batch(result.gradients.back(), "gradient"));
      }
    }
  }

  void append_items() {
    for (int side = 0; side < 2; ++side) {
      for (int64_t l = 0; l < levels_ && call_.gradient[side]; ++l) {
        if (!maps_[side][l].channels_last) continue;
        for (int64_t b = 0; b < batch_; ++b) append_clearing(items_, l, b, side, gradients_[side][l]);
      }
    }
    for (int64_t l = 0; l < levels_; ++l) {
      for (int64_t b = 0; b < batch_; ++b) append_blocks(items_, l, b, maps_[0][l].channels, width(l, b));
    }
  }

  // Channels-last maps are read and written in pieces of a block's width, so wide ones are better, as long as their
  // scratch stays small.
  int64_t width(int64_t level, int64_t image) const {
    const int64_t channels = maps_[0][level].channels;
    bool wide = sizeof(T) == sizeof(float) && channels >= kWideBlock && shared_[level] && !call_.per_box;
    for (int side = 0; side < 2; ++side) {
      wide &= maps_[side][level].channels_last;
    }
    const Plan<T>& p = plans_[0][level * batch_ + image];
    const int64_t bytes = (p.pixels + p.gradient_pixels) * kWideBlock * static_cast<int64_t>(sizeof(T));
    return wide && bytes <= kMostWideScratch ? kWideBlock : block_width<T>(channels);
  }

  ScratchSizes scratch_sizes(const Item& item) const {
    const int64_t width = item.channels.width, bins = call_.options.bins();
    ScratchSizes sizes;
    for (int side = 0; side < (shared_[item.level] ? 1 : 2); ++side) {
      const Plan<T>& p = plan(side, item);
      sizes.values[side] = (p.pixels + kSlack) * width;
      if (call_.gradient[side] || (gradients_wanted_ && shared_[item.level])) {
        sizes.gradients[side] = width == kWideBlock ? p.gradient_pixels * width : sizes.values[side];
      }
      sizes.sums = std::max(sizes.sums, p.rows * width);
    }
    sizes.pooled = (bins + kSlack) * width;
    return sizes;
  }

  DistillTask<T> make_task(const Item& item) const {
    DistillTask<T> task{};
    task.plan[0] = &plan(0, item);
    if (!shared_[item.level]) task.plan[1] = &plan(1, item);
    for (int side = 0; side < 2; ++side) {
      task.map[side] = maps_[side][item.level].image(item.image);
      if (call_.gradient[side]) task.gradient[side] = gradients_[side][item.level].image(item.image);
    }
    task.bins_y = call_.options.bins_y;
    task.bins_x = call_.options.bins_x;
    task.channels = item.channels;
    return task;
  }

  void sum_box_losses(const std::vector<DoubleList>& patch_losses, Result& result) const {
    result.box_losses.assign(boxes_.count, 0.0);
    for (size_t i = 0; i < items_.size(); ++i) {
      for (size_t n = 0; n < patch_losses[i].size(); ++n) {
        result.box_losses[plan(0, items_[i]).patches[n].box] += patch_losses[i][n];
      }
    }
    result.total = 0.0;
    for (const double loss : result.box_losses) result.total += loss;
  }

  const Distillation& call_;
  const Boxes& boxes_;
  const std::vector<MapBatch> maps_[2];
  std::vector<MapBatch> gradients_[2];
  std::vector<bool> shared_;  // per level: one shape and stride, so the difference is taken at load
  std::vector<Plan<T>> plans_[2];
  std::vector<Item> items_;
  int64_t levels_, batch_;
  bool gradients_wanted_;
};

Result distill(const Distillation& call) {
  const auto apprentice = map_batches(call.apprentice, "apprentice");
  const auto expert = map_batches(call.expert, "expert");
  STD_TORCH_CHECK(apprentice.size() == expert.size() && apprentice.size() == call.strides.size() &&
                      apprentice.size() == call.expert_strides.size(),
                  "expert: expected as many maps and strides as apprentice");
  STD_TORCH_CHECK(apprentice[0].batch == expert[0].batch && apprentice[0].channels == expert[0].channels &&
                      call.apprentice[0].scalar_type() == call.expert[0].scalar_type(),
                  "expert: expected the apprentice's batch size, channels and dtype");
  const Boxes boxes(call.boxes, apprentice[0].batch);
  STD_TORCH_CHECK(call.coefficients.dim() == 1 && call.coefficients.size(0) == boxes.count &&
                      call.coefficients.scalar_type() == ScalarType::Double && call.coefficients.is_contiguous(),
                  "coefficients: expected contiguous float64 [K]");
  if (call.apprentice[0].scalar_type() == ScalarType::Double) {
    return Job<double>(call, boxes, apprentice, expert).run_all();
  }
  return Job<float>(call, boxes, apprentice, expert).run_all();
}

Tensor scalar_tensor(double value) {
  Tensor t = torch::stable::empty({}, ScalarType::Double);
  *static_cast<double*>(t.data_ptr()) = value;
  return t;
}

std::tuple<Tensor, Tensor> distill_loss(std::vector<Tensor> apprentice, std::vector<Tensor> expert, Tensor boxes,
                                        Tensor coefficients, DoubleList strides, DoubleList expert_strides,
                                        IntList output_size, int64_t sampling_ratio, int64_t assignment, double sigma,
                                        double canonical_size, double canonical_level) {
  const Options options(output_size, sampling_ratio, assignment, sigma, canonical_size, canonical_level);
  const Result result =
      distill({apprentice, expert, boxes, coefficients, strides, expert_strides, options, true, {false, false}});
  Tensor losses = torch::stable::empty({boxes.size(0)}, ScalarType::Double);
  std::copy(result.box_losses.begin(), result.box_losses.end(), static_cast<double*>(losses.data_ptr()));
  return {scalar_tensor(result.total), losses};
}

std::tuple<Tensor, std::vector<Tensor>> distill_gradient(std::vector<Tensor> apprentice, std::vector<Tensor> expert,
                                                         Tensor boxes, Tensor coefficients, DoubleList strides,
                                                         DoubleList expert_strides, IntList output_size,
                                                         int64_t sampling_ratio, int64_t assignment, double sigma,
                                                         double canonical_size, double canonical_level,
                                                         bool apprentice_gradient, bool expert_gradient) {
  const Options options(output_size, sampling_ratio, assignment, sigma, canonical_size, canonical_level);
  Result result = distill({apprentice,
                           expert,
                           boxes,
                           coefficients,
                           strides,
                           expert_strides,
                           options,
                           false,
                           {apprentice_gradient, expert_gradient}});
  return {scalar_tensor(result.total), std::move(result.gradients)};
}

Tensor cpu_level_weights(Tensor boxes, DoubleList strides, int64_t assignment, double sigma, double canonical_size,
                         double canonical_level) {
  const Options options({1, 1}, 1, assignment, sigma, canonical_size, canonical_level);
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5 && boxes.scalar_type() == ScalarType::Double &&
                      boxes.is_contiguous() && !strides.empty(),
                  "boxes: expected contiguous float64 [K, 5]");
  const auto levels = static_cast<int64_t>(strides.size());
  DoubleList level_of;
  for (const double stride : strides) level_of.push_back(std::log2(stride));
  Tensor weights = torch::stable::empty({boxes.size(0), levels}, ScalarType::Double);
  const auto* box = static_cast<const double*>(boxes.data_ptr());
  auto* row = static_cast<double*>(weights.data_ptr());
  for (int64_t k = 0; k < boxes.size(0); ++k, box += 5, row += levels) {
    level_weights(box[3] - box[1], box[4] - box[2], level_of.data(), levels, options.rule, row);
  }
  return weights;
}

}  // namespace
}  // namespace rakd

STABLE_TORCH_LIBRARY_IMPL(rakd_ops, CPU, m) {
  m.impl("distill_loss", TORCH_BOX(&rakd::distill_loss));
  m.impl("distill_gradient", TORCH_BOX(&rakd::distill_gradient));
  m.impl("level_weights", TORCH_BOX(&rakd::cpu_level_weights));
}

STABLE_TORCH_LIBRARY_IMPL(rakd_ops, CompositeExplicitAutograd, m) {
  m.impl("release_memory", TORCH_BOX(&rakd::release_kept));
}
