// CPU ops distill_loss and distill_gradient: the distillation loss of all levels, images and boxes.
//
//   rows, index --box_plan.h--> plans (level, image) --tasks.h--> items (level, image, channels) --> kernels.cpp
#include <algorithm>
#include <optional>

#include "tasks.h"

namespace rakd {
namespace {

struct Distillation {
  Maps maps[2];  // [levels] apprentice, expert
  BoxRows boxes;
  DoubleList factor;      // [K] of the boxes' weights; empty: 1
  DoubleList strides[2];  // [levels] of each side
  PlanOptions options;
  bool per_box;  // losses of the boxes are wanted
  bool gradient[2];
};

struct Result {
  double total = 0.0;
  DoubleList box_losses;  // [K]
  Tensors gradients;      // apprentice's, then expert's, where wanted
};

template <class T>
class Job {
 public:
  explicit Job(const Distillation& call) : call_(call) {
    const Maps &apprentice = call.maps[0], &expert = call.maps[1];
    levels_ = static_cast<int64_t>(apprentice.size());
    batch_ = apprentice[0].batch;
    bool all_shared = true;
    for (int64_t l = 0; l < levels_; ++l) {
      shared_.push_back(apprentice[l].height == expert[l].height && apprentice[l].width == expert[l].width &&
                        call.strides[0][l] == call.strides[1][l]);
      all_shared &= shared_[l];
    }
    for (int side = 0; side < (all_shared ? 1 : 2); ++side) plans_[side] = make_plans(side);
  }

  Result run_all() {
    Result result;
    allocate(result);
    Work work;
    append_items(work);
    std::vector<double> totals(work.items.size(), 0.0);
    std::vector<DoubleList> patch_losses(call_.per_box ? work.items.size() : 0);
    run_items<T>(work, [&](int64_t i, Scratch<T>& scratch) {
      const Item& item = work.items[i];
      if (item.clear_side >= 0) {
        const int64_t side = shared_[item.level] ? 0 : item.clear_side;
        return clear_outside_support(plan(side, item.level, item.image), gradients_[item.clear_side][item.level], item);
      }
      DistillTask<T> task = make_task(item);
      if (call_.per_box) {
        patch_losses[i].resize(task.plan[0]->patch_count);
        task.patch_losses = patch_losses[i].data();
      }
      best_kernels<T>().distill(task, scratch);
      totals[i] = task.total;
    });
    if (call_.per_box) {
      result.box_losses.assign(call_.boxes.count, 0.0);
      for (size_t i = 0; i < work.items.size(); ++i) {
        const Plan<T>& p = plan(0, work.items[i].level, work.items[i].image);
        for (size_t n = 0; n < patch_losses[i].size(); ++n) result.box_losses[p.patches[n].box] += patch_losses[i][n];
      }
    }
    // Fixed order: the same bits for any schedule.
    for (const double loss : call_.per_box ? result.box_losses : totals) result.total += loss;
    // Half an inner product may round to just below zero, which a sum of squares never is.
    if (result.total < 0.0 && weights_are_positive()) result.total = 0.0;
    return result;
  }

 private:
  static constexpr int64_t kMaxWideScratch = int64_t(11) << 19;  // bytes, per thread

  const Plan<T>& plan(int64_t side, int64_t level, int64_t image) const { return plans_[side][level * batch_ + image]; }

  std::vector<Plan<T>> make_plans(int side) const {
    PlanOptions options = call_.options;
    if (!call_.factor.empty()) options.box_factor = call_.factor.data();
    options.gradients = call_.gradient[0] || call_.gradient[1];
    std::vector<PlanLevel> levels;
    for (int64_t l = 0; l < levels_; ++l) {
      const MapBatch& map = call_.maps[side][l];
      const int64_t width = block_width<T>(map.channels);
      levels.push_back(PlanLevel{call_.strides[side][l], map.height, map.width});
      levels[l].factor = 1.0 / static_cast<double>(map.channels * options.bins());
      // The Gram operator is of the difference of two maps, so it needs maps of one shape, and sums over the boxes.
      if (shared_[l] && !call_.per_box) levels[l].channel_blocks = (map.channels + width - 1) / width;
    }
    return build_plans<T>(call_.boxes, options, levels);
  }

  void allocate(Result& result) {
    for (int side = 0; side < 2; ++side) {
      if (!call_.gradient[side]) continue;
      gradients_[side].reserve(levels_);
      for (const MapBatch& map : call_.maps[side]) {
        const IntList shape{map.batch, map.channels, map.height, map.width};
        result.gradients.push_back(empty_tensor(map.type, shape, map.channels_last));
        gradients_[side].push_back(map_batch(result.gradients.back(), "gradient"));
      }
    }
  }

  void append_items(Work& work) const {
    for (int side = 0; side < 2; ++side) {
      for (size_t l = 0; l < gradients_[side].size(); ++l) append_clearing(work, l, side, gradients_[side][l]);
    }
    for (int64_t l = 0; l < levels_; ++l) {
      for (int64_t b = 0; b < batch_; ++b) {
        const int64_t width = block_width_of(l, b);
        int64_t values = plan_values(plan(0, l, b), call_.options.bins());
        for (const Maps& maps : gradients_) values += maps.empty() ? 0 : maps[l].height * maps[l].width;
        work.add_blocks(l, b, call_.maps[0][l].channels, width, values, scratch_sizes(l, b, width));
      }
    }
  }

  // Channels-last maps are read and written in pieces of a block's width, so wide ones are better, as long as their
  // scratch stays small.
  int64_t block_width_of(int64_t level, int64_t image) const {
    const MapBatch &apprentice = call_.maps[0][level], &expert = call_.maps[1][level];
    const bool wide = sizeof(T) == sizeof(float) && apprentice.channels >= kWideBlock && shared_[level] &&
                      !call_.per_box && apprentice.channels_last && expert.channels_last;
    const Plan<T>& p = plan(0, level, image);
    const int64_t bytes = (p.cells + p.gradient_cells) * kWideBlock * static_cast<int64_t>(sizeof(T));
    return wide && bytes <= kMaxWideScratch ? kWideBlock : block_width<T>(apprentice.channels);
  }

  ScratchSizes scratch_sizes(int64_t level, int64_t image, int64_t width) const {
    ScratchSizes sizes;
    for (int side = 0; side < (shared_[level] ? 1 : 2); ++side) {
      const Plan<T>& p = plan(side, level, image);
      sizes.values[side] = (p.cells + kSlack) * width;
      if (call_.gradient[side] || (shared_[level] && call_.gradient[1])) {
        sizes.gradients[side] = width == kWideBlock ? p.gradient_cells * width : sizes.values[side];
      }
      sizes.sums = std::max(sizes.sums, p.rows * width);
    }
    sizes.pooled = (call_.options.bins() + kSlack) * width;
    return sizes;
  }

  DistillTask<T> make_task(const Item& item) const {
    DistillTask<T> task{};
    task.plan[0] = &plan(0, item.level, item.image);
    if (!shared_[item.level]) task.plan[1] = &plan(1, item.level, item.image);
    for (int side = 0; side < 2; ++side) {
      task.map[side] = call_.maps[side][item.level].image(item.image);
      if (call_.gradient[side]) task.gradient[side] = gradients_[side][item.level].image(item.image);
    }
    task.bins = call_.options.bins();
    task.channels = item.channels;
    return task;
  }

  bool weights_are_positive() const {
    const auto positive = [](double weight) { return weight >= 0.0; };
    for (int64_t k = 0; k < call_.boxes.count; ++k) {
      const double* row = call_.boxes.row(k);
      if (!std::all_of(row + 5, row + 5 + levels_, positive)) return false;
    }
    return std::all_of(call_.factor.begin(), call_.factor.end(), positive);
  }

  const Distillation& call_;
  Maps gradients_[2];
  std::vector<bool> shared_;       // [levels] one shape and stride, so that the difference is taken while gathering
  std::vector<Plan<T>> plans_[2];  // [levels * batch]
  int64_t levels_, batch_;
};

bool any_double(const Maps& maps) {
  return std::any_of(maps.begin(), maps.end(), [](const MapBatch& map) { return map.element == Number::kDouble; });
}

// Total, losses [K] (of no value unless per_box), gradients.
std::tuple<Tensor, Tensor, Tensors> distill(const Tensors& apprentice, const Tensors& expert, const Tensor& rows,
                                            const Tensor& index, const std::optional<Tensor>& factor,
                                            const DoubleList& strides, const DoubleList& expert_strides,
                                            const IntList& output_size, int64_t sampling_ratio, bool per_box,
                                            bool apprentice_gradient, bool expert_gradient) {
  check_environment();
  Distillation call{{map_batches(apprentice, strides, "apprentice"), map_batches(expert, expert_strides, "expert")},
                    {},
                    {},
                    {strides, expert_strides},
                    plan_options(output_size, sampling_ratio),
                    per_box,
                    {apprentice_gradient, expert_gradient}};
  const Maps& maps = call.maps[0];
  STD_TORCH_CHECK(maps.size() == call.maps[1].size(), "expert: expected ", maps.size(), " maps as in apprentice, got ",
                  call.maps[1].size());
  for (size_t l = 0; l < maps.size(); ++l) {
    const MapBatch& other = call.maps[1][l];
    STD_TORCH_CHECK(maps[l].batch == other.batch && maps[l].channels == other.channels, "expert: expected ",
                    maps[l].batch, " images and ", maps[l].channels, " channels as in apprentice on level ", l,
                    ", got ", other.batch, " and ", other.channels);
  }
  check_extents(apprentice, strides, expert, expert_strides);
  call.boxes = box_rows(rows, index, maps[0].batch, static_cast<int64_t>(maps.size()));
  const int64_t count = call.boxes.count;
  if (factor) {
    const Numbers given = numbers(*factor, rows, "factor");
    STD_TORCH_CHECK(factor->dim() == 0 || (factor->dim() == 1 && factor->size(0) == count),
                    "factor: expected shape [] or [", count, "]");
    for (int64_t k = 0; k < count; ++k) call.factor.push_back(given.at(k, 0));
  }
  const bool wide = any_double(maps) || any_double(call.maps[1]);
  Result result = wide ? Job<double>(call).run_all() : Job<float>(call).run_all();
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  const auto losses = static_cast<int64_t>(result.box_losses.size());
  return {tensor_of(type, {}, &result.total), tensor_of(type, {losses}, result.box_losses.data()),
          std::move(result.gradients)};
}

std::tuple<Tensor, Tensor> distill_loss(Tensors apprentice, Tensors expert, Tensor rows, Tensor index,
                                        DoubleList strides, DoubleList expert_strides, IntList output_size,
                                        int64_t sampling_ratio) {
  const auto [total, losses, _] = distill(apprentice, expert, rows, index, std::nullopt, strides, expert_strides,
                                          output_size, sampling_ratio, true, false, false);
  return {total, losses};
}

std::tuple<Tensor, Tensors> distill_gradient(Tensors apprentice, Tensors expert, Tensor rows, Tensor index,
                                             std::optional<Tensor> factor, DoubleList strides,
                                             DoubleList expert_strides, IntList output_size, int64_t sampling_ratio,
                                             bool apprentice_gradient, bool expert_gradient) {
  auto [total, _, gradients] = distill(apprentice, expert, rows, index, factor, strides, expert_strides, output_size,
                                       sampling_ratio, false, apprentice_gradient, expert_gradient);
  return {total, std::move(gradients)};
}

}  // namespace
}  // namespace rakd

STABLE_TORCH_LIBRARY_IMPL(rakd_ops, CPU, m) {
  m.impl("distill_loss", TORCH_BOX(&rakd::distill_loss));
  m.impl("distill_gradient", TORCH_BOX(&rakd::distill_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(rakd_ops, CompositeExplicitAutograd, m) {
  m.impl("release_memory", TORCH_BOX(&rakd::release_cache));
}
