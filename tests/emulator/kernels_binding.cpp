// Binds the real kernels (kernels.cpp) to numpy arrays. An array comes with the number of its type (rakd::Number), as
// numpy has no bfloat16.
#include "kernels.h"

#include <pybind11/stl.h>

#include "bindings.h"

namespace py = pybind11;
using namespace real;

namespace {

typedef std::pair<py::array, int> Typed;
typedef std::vector<Typed> Pyramid;

Array describe(emulator::Buffers& buffers, const Typed& typed, emulator::Access access) {
  const py::array& array = typed.first;
  Array result;
  result.data = buffers.raw(array, access);
  result.type = static_cast<rakd::Number>(typed.second);
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    result.size[i] = array.shape(i);
    result.stride[i] = array.strides(i) / array.itemsize();
  }
  return result;
}

Arrays describe(emulator::Buffers& buffers, const Pyramid& arrays, emulator::Access access) {
  Arrays result;
  for (const Typed& array : arrays) result.push_back(describe(buffers, array, access));
  return result;
}

constexpr auto kIn = emulator::Access::kRead, kOut = emulator::Access::kWrite;

Call make_call(emulator::Buffers& buffers, const py::dict& options, const py::array& rows, const py::array& index) {
  Call call;
  call.strides[0] = options["strides"].cast<std::vector<double>>();
  call.strides[1] = options["expert_strides"].cast<std::vector<double>>();
  const auto bins = options["output_size"].cast<std::vector<int64_t>>();
  const auto threads = options["threads"].cast<std::vector<int>>();
  for (int axis = 0; axis < 2; ++axis) call.bins[axis] = bins.at(axis);
  for (int step = 0; step < 3; ++step) call.threads[step] = threads.at(step);
  call.sampling_ratio = options["sampling_ratio"].cast<int64_t>();
  call.rows = describe(buffers, {rows, int(rakd::Number::kDouble)}, kIn);
  call.index = describe(buffers, {index, int(rakd::Number::kInt32)}, kIn);
  return call;
}

Boxes make_boxes(emulator::Buffers& buffers, const py::dict& options, const Pyramid& boxes, const Pyramid& box_weights,
                 const Pyramid& level_weights) {
  Boxes result;
  result.boxes = describe(buffers, boxes, kIn);
  rakd::Preparation& preparation = result.preparation;
  const auto strides = options["strides"].cast<std::vector<double>>();
  preparation.levels = static_cast<int32_t>(strides.size());
  for (size_t l = 0; l < strides.size(); ++l) preparation.level_of[l] = std::log2(strides[l]);
  preparation.rule =
      rakd::LevelRule{static_cast<rakd::Assignment>(options["assignment"].cast<int>()), options["sigma"].cast<double>(),
                      options["canonical_size"].cast<double>(), options["canonical_level"].cast<double>()};
  preparation.images = options["images"].cast<int64_t>();
  preparation.factor = options["factor"].cast<double>();
  if (!box_weights.empty()) preparation.box_weights = describe(buffers, box_weights, kIn)[0].numbers();
  if (!level_weights.empty()) preparation.level_weights = describe(buffers, level_weights, kIn)[0].numbers();
  return result;
}

}  // namespace

PYBIND11_MODULE(emulated, module) {
  emulator::bind(module);
  module.def("prepare", [](const py::dict& options, const Pyramid& boxes, const Pyramid& box_weights,
                           const Pyramid& level_weights, const py::array& rows, const py::array& index) {
    emulator::Buffers buffers;
    const Boxes call = make_boxes(buffers, options, boxes, box_weights, level_weights);
    double* rows_out = buffers.out<double>(rows);
    run_prepare(call, rows_out, buffers.out<int32_t>(index));
    buffers.finish();
  });
  module.def("level_weights", [](const py::dict& options, const Pyramid& boxes, const Typed& weights) {
    emulator::Buffers buffers;
    const Boxes call = make_boxes(buffers, options, boxes, {}, {});
    run_level_weights(call, describe(buffers, weights, kOut));
    buffers.finish();
  });
  module.def("distill",
             [](const py::dict& options, const py::array& rows, const py::array& index, const Pyramid& apprentice,
                const Pyramid& expert, const Pyramid& factor, const Pyramid& apprentice_gradient,
                const Pyramid& expert_gradient, const Typed& losses, const Typed& total) {
               emulator::Buffers buffers;
               const Call call = make_call(buffers, options, rows, index);
               const Arrays maps[2] = {describe(buffers, apprentice, kIn), describe(buffers, expert, kIn)};
               const Arrays gradients[2] = {describe(buffers, apprentice_gradient, kOut),
                                            describe(buffers, expert_gradient, kOut)};
               const Array scale = factor.empty() ? Array{} : describe(buffers, factor[0], kIn);
               const Array losses_out = describe(buffers, losses, kOut);
               run_distill(call, maps, gradients, scale, losses_out, describe(buffers, total, kOut));
               buffers.finish();
             });
  module.def("align", [](const py::dict& options, const py::array& rows, const py::array& index,
                         const Pyramid& features, const Typed& output) {
    emulator::Buffers buffers;
    const Call call = make_call(buffers, options, rows, index);
    const Arrays maps = describe(buffers, features, kIn);
    run_align(call, maps, describe(buffers, output, kOut));
    buffers.finish();
  });
  module.def("align_backward", [](const py::dict& options, const py::array& rows, const py::array& index,
                                  const Typed& output_gradient, const Pyramid& gradients) {
    emulator::Buffers buffers;
    const Call call = make_call(buffers, options, rows, index);
    const Array from = describe(buffers, output_gradient, kIn);
    run_align_backward(call, from, describe(buffers, gradients, kOut));
    buffers.finish();
  });
}
