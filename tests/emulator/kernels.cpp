// Runs the kernels of csrc/cuda on the CPU; see kernels.h. Each array of the workspace is poisoned and guarded.
#include "kernels.h"

#include <algorithm>
#include <memory>

#include "cuda/launch.h"
#include "guards.h"

namespace real {
namespace {

using namespace rakd::gpu;
using rakd::Number;

// The workspace of a call. What no kernel wrote reads as NaN or -1.
class Memory {
 public:
  template <class U>
  U* take(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(U);
    arrays_.push_back(std::make_unique<emulator::Guarded>(bytes, 512, 0));
    return reinterpret_cast<U*>(arrays_.back()->data());
  }
  template <class F>
  void lay_out(const F& f) {
    f(*this);
  }
  void check() {
    for (const auto& array : arrays_) {
      if (const char* where = array->damage()) throw emulator::Error(std::string("write ") + where + " a workspace");
    }
  }

 private:
  std::vector<std::unique_ptr<emulator::Guarded>> arrays_;
};

Maps maps_of(const Arrays& arrays) {
  Maps maps;
  for (const Array& a : arrays) {
    Map map{a.data, a.type, {}, {}};
    std::copy_n(a.size, 4, map.size);
    std::copy_n(a.stride, 4, map.stride);
    maps.push_back(map);
  }
  return maps;
}

Problem problem_of(const Call& call) {
  const int64_t boxes = call.rows.size[0];
  return Problem{boxes,
                 call.index.size[0] - 1 - boxes,
                 {call.strides[0], call.strides[1]},
                 {call.bins[0], call.bins[1]},
                 call.sampling_ratio,
                 static_cast<const double*>(call.rows.data),
                 static_cast<const int32_t*>(call.index.data)};
}

BlockSizes block_sizes(const Call& call) { return BlockSizes{call.threads[0], call.threads[1], call.threads[2]}; }

rakd::BoxLists lists_of(const Boxes& boxes) {
  rakd::BoxLists lists;
  lists.whole = boxes.boxes.at(0).size[1] == 5;
  for (const Array& array : boxes.boxes) {
    lists.list.push_back(array.numbers());
    lists.count.push_back(array.size[0]);
    lists.total += array.size[0];
  }
  return lists;
}

}  // namespace

void run_prepare(const Boxes& boxes, double* rows, int32_t* index) {
  launch_prepare(boxes.preparation, lists_of(boxes), rows, index, nullptr);
}

void run_level_weights(const Boxes& boxes, const Array& weights) {
  if (weights.type == Number::kDouble) {
    launch_level_weights(boxes.preparation, lists_of(boxes), static_cast<double*>(weights.data), nullptr);
  } else {
    launch_level_weights(boxes.preparation, lists_of(boxes), static_cast<float*>(weights.data), nullptr);
  }
}

void run_distill(const Call& call, const Arrays (&maps)[2], const Arrays (&gradients)[2], const Array& factor,
                 const Array& losses, const Array& total) {
  Distillation distillation;
  distillation.problem = problem_of(call);
  for (int side = 0; side < 2; ++side) {
    distillation.map[side] = maps_of(maps[side]);
    distillation.gradient[side] = maps_of(gradients[side]);
  }
  distillation.factor = factor.numbers();
  const bool has_gradients = !gradients[0].empty() || !gradients[1].empty();
  distillation.losses = has_gradients ? nullptr : losses.data;
  distillation.total = total.data;
  Memory memory;
  if (total.type == Number::kDouble) {
    distill<double>(memory, distillation, block_sizes(call), nullptr);
  } else {
    distill<float>(memory, distillation, block_sizes(call), nullptr);
  }
  memory.check();
}

void run_align(const Call& call, const Arrays& features, const Array& output) {
  Memory memory;
  if (output.type == Number::kDouble) {
    align<double>(memory, problem_of(call), maps_of(features), output.data, block_sizes(call), nullptr);
  } else {
    align<float>(memory, problem_of(call), maps_of(features), output.data, block_sizes(call), nullptr);
  }
  memory.check();
}

void run_align_backward(const Call& call, const Array& output_gradient, const Arrays& gradients) {
  Memory memory;
  align_backward(memory, problem_of(call), output_gradient.data, maps_of(gradients), block_sizes(call), nullptr);
  memory.check();
}

}  // namespace real
