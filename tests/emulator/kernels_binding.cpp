// Binds the real kernels (kernels.cpp) to numpy arrays.
#include "kernels.h"

#include <pybind11/stl.h>

#include "bindings.h"

namespace py = pybind11;
using namespace real;

namespace {

typedef std::vector<py::array> Arrays;

// Strides and sizes of an array [images, channels, height, width] whose copy lies at `data`.
Map describe(const py::array& array, void* data) {
  Map map;
  map.data = data;
  for (int i = 0; i < 4; ++i) map.stride[i] = array.strides(i) / array.itemsize();
  for (int axis = 0; axis < 2; ++axis) map.size[axis] = array.shape(2 + axis);
  return map;
}

template <class E>
std::vector<Map> inputs(emulator::Buffers& buffers, const Arrays& arrays) {
  std::vector<Map> maps;
  for (const py::array& array : arrays) maps.push_back(describe(array, const_cast<E*>(buffers.in<E>(array))));
  return maps;
}

template <class E>
std::vector<Map> outputs(emulator::Buffers& buffers, const Arrays& arrays) {
  std::vector<Map> maps;
  for (const py::array& array : arrays) maps.push_back(describe(array, buffers.out<E>(array)));
  return maps;
}

Problem make_problem(const py::dict& options, const py::array& map) {
  Problem problem;
  problem.images = map.shape(0);
  problem.channels = map.shape(1);
  problem.strides = options["strides"].cast<std::vector<double>>();
  problem.expert_strides = options["expert_strides"].cast<std::vector<double>>();
  const auto bins = options["output_size"].cast<std::vector<int64_t>>();
  const auto threads = options["threads"].cast<std::vector<int>>();
  for (int axis = 0; axis < 2; ++axis) problem.bins[axis] = bins.at(axis);
  for (int step = 0; step < 5; ++step) problem.threads[step] = threads.at(step);
  problem.form = options["form"].cast<int>();
  problem.sampling_ratio = options["sampling_ratio"].cast<int64_t>();
  problem.assignment = options["assignment"].cast<int64_t>();
  problem.sigma = options["sigma"].cast<double>();
  problem.canonical_size = options["canonical_size"].cast<double>();
  problem.canonical_level = options["canonical_level"].cast<double>();
  return problem;
}

template <class E>
void bind_typed(py::module_& module, const std::string& name) {
  module.def(("distill_" + name).c_str(),
             [](const py::dict& options, const Arrays& apprentice, const Arrays& expert, const py::array& boxes,
                const py::array& coefficients, const Arrays& apprentice_gradient, const Arrays& expert_gradient,
                const py::array& losses, const py::array& total) {
               emulator::Buffers buffers;
               Problem problem = make_problem(options, apprentice.at(0));
               problem.boxes = boxes.shape(0);
               problem.rows = buffers.in<double>(boxes);
               problem.coefficients = buffers.in<double>(coefficients);
               const auto a = inputs<E>(buffers, apprentice), e = inputs<E>(buffers, expert);
               const auto ga = outputs<E>(buffers, apprentice_gradient), ge = outputs<E>(buffers, expert_gradient);
               double* box_losses = buffers.out<double>(losses);
               const bool gram = run_distill<E>(problem, a, e, ga, ge, box_losses, buffers.out<double>(total));
               buffers.finish();
               return gram;
             });
  module.def(("align_" + name).c_str(),
             [](const py::dict& options, const Arrays& features, const py::array& boxes, const py::array& output) {
               emulator::Buffers buffers;
               Problem problem = make_problem(options, features.at(0));
               problem.boxes = boxes.shape(0);
               problem.rows = buffers.in<double>(boxes);
               const auto maps = inputs<E>(buffers, features);
               run_align<E>(problem, maps, buffers.out<E>(output));
               buffers.finish();
             });
  module.def(("align_backward_" + name).c_str(), [](const py::dict& options, const py::array& output_gradient,
                                                    const py::array& boxes, const Arrays& gradients) {
    emulator::Buffers buffers;
    Problem problem = make_problem(options, gradients.at(0));
    problem.boxes = boxes.shape(0);
    problem.rows = buffers.in<double>(boxes);
    const E* from = buffers.in<E>(output_gradient);
    run_align_backward<E>(problem, from, outputs<E>(buffers, gradients));
    buffers.finish();
  });
}

}  // namespace

PYBIND11_MODULE(emulated, module) {
  emulator::bind(module);
  bind_typed<float>(module, "float32");
  bind_typed<double>(module, "float64");
  bind_typed<__half>(module, "float16");
  bind_typed<__nv_bfloat16>(module, "bfloat16");
}
