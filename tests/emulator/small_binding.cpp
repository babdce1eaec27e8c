// Binds small_kernels.cpp for the emulator's own tests.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "bindings.h"
#include "small_kernels.h"

namespace py = pybind11;
using namespace small;

namespace {

template <typename T>
void bind_typed(py::module_& module) {
  const std::string suffix = "_" + std::string(py::str(py::dtype::of<T>()));
  module.def(("block_sums" + suffix).c_str(), [](const py::array& input, const py::array& sums, int threads) {
    emulator::Buffers buffers;
    const T* from = buffers.in<T>(input);
    run_block_sums<T>(from, buffers.out<T>(sums), input.size(), sums.size(), threads, nullptr);
    buffers.finish();
  });
  module.def(("shuffles" + suffix).c_str(),
             [](const py::array& input, const py::array& output, unsigned mask, int argument, int width) {
               emulator::Buffers buffers;
               const T* from = buffers.in<T>(input);
               run_shuffles<T>(from, buffers.out<T>(output), input.size(), mask, argument, width, nullptr);
               buffers.finish();
             });
}

template <typename T>
void bind_conversions(py::module_& module, const std::string& type) {
  module.def(("widen_" + type).c_str(), [](const py::array& input, const py::array& output) {
    emulator::Buffers buffers;
    const T* from = buffers.in<T>(input);
    run_widen<T>(from, buffers.out<float>(output), input.size(), nullptr);
    buffers.finish();
  });
  module.def(("narrow_" + type).c_str(), [](const py::array& input, const py::array& output) {
    emulator::Buffers buffers;
    const float* from = buffers.in<float>(input);
    run_narrow<T>(from, buffers.out<T>(output), input.size(), nullptr);
    buffers.finish();
  });
}

dim3 as_dim3(const std::array<unsigned, 3>& sizes) { return dim3(sizes[0], sizes[1], sizes[2]); }

}  // namespace

PYBIND11_MODULE(emulated, module) {
  emulator::bind(module);
  bind_typed<float>(module);
  bind_typed<double>(module);
  bind_typed<int32_t>(module);
  bind_typed<int64_t>(module);
  module.def("transpose", [](const py::array& input, const py::array& output, int tile,
                             const std::array<unsigned, 3>& block, size_t misalign) {
    emulator::Buffers buffers(misalign);
    const float* from = buffers.in<float>(input);
    run_transpose(from, buffers.out<float>(output), input.shape(0), input.shape(1), tile, as_dim3(block), nullptr);
    buffers.finish();
  });
  module.def("prefix_sum", [](const py::array& values, int threads) {
    emulator::Buffers buffers;
    run_prefix_sum(buffers.inout<int>(values), values.size() / threads, threads, nullptr);
    buffers.finish();
  });
  module.def("histogram", [](const py::array& input, const py::array& bins, int threads) {
    emulator::Buffers buffers;
    const int* from = buffers.in<int>(input);
    run_histogram(from, buffers.inout<int>(bins), input.size(), threads, nullptr);
    buffers.finish();
  });
  module.def("coordinates",
             [](const py::array& output, const std::array<unsigned, 3>& grid, const std::array<unsigned, 3>& block) {
               emulator::Buffers buffers;
               run_coordinates(buffers.out<int64_t>(output), as_dim3(grid), as_dim3(block), nullptr);
               buffers.finish();
             });
  module.def("mistaken", [](const std::string& name, const py::array& input, const py::array& output, int threads,
                            int shared_bytes) {
#define NAME(name) #name,
    static const char* const names[] = {MISTAKES(NAME)};
#undef NAME
    const auto mistake = static_cast<Mistake>(std::find(std::begin(names), std::end(names), name) - std::begin(names));
    emulator::Buffers buffers;
    auto* from = const_cast<float*>(buffers.in<float>(input));
    run_mistaken(mistake, from, buffers.out<float>(output), input.size() / threads, threads, shared_bytes, nullptr);
    buffers.finish();
  });
  bind_conversions<__half>(module, "half");
  bind_conversions<__nv_bfloat16>(module, "bfloat16");
}
