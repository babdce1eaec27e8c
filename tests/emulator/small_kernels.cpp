// Binds small_kernels.h for the emulator's own tests.
#include "small_kernels.h"

#include "bindings.h"

namespace py = pybind11;

namespace {

template <typename T>
void bind_typed(py::module_& module) {
  // Overloads are told apart by the dtype, which `holds` checks, so the first argument names it.
  const std::string suffix = "_" + std::string(py::str(py::dtype::of<T>()));
  module.def(("block_sums" + suffix).c_str(), [](const py::array& input, const py::array& sums, int threads) {
    emulator::Buffers buffers;
    const T* from = buffers.in<T>(input);
    T* to = buffers.out<T>(sums);
    RAKD_LAUNCH(block_sums<T>, sums.size(), threads, threads / 32 * sizeof(T), nullptr, from, to, input.size());
    buffers.finish();
  });
  module.def(("shuffles" + suffix).c_str(),
             [](const py::array& input, const py::array& output, unsigned mask, int argument, int width) {
               emulator::Buffers buffers;
               const T* from = buffers.in<T>(input);
               T* to = buffers.out<T>(output);
               RAKD_LAUNCH((shuffles<T>), 1, input.size(), 0, nullptr, from, to, mask, argument, width);
               buffers.finish();
             });
}

}  // namespace

PYBIND11_MODULE(emulated, module) {
  emulator::bind(module);
  bind_typed<float>(module);
  bind_typed<double>(module);
  bind_typed<int32_t>(module);
  bind_typed<int64_t>(module);
  module.def("transpose", [](const py::array& input, const py::array& output, int tile, int x, int y, size_t misalign) {
    emulator::Buffers buffers(misalign);
    const float* from = buffers.in<float>(input);
    float* to = buffers.out<float>(output);
    const unsigned rows = input.shape(0), columns = input.shape(1);
    const dim3 grid((columns + tile - 1) / tile, (rows + tile - 1) / tile);
    RAKD_LAUNCH(transpose, grid, dim3(x, y), tile * (tile + 1) * sizeof(float), nullptr, from, to, rows, columns, tile);
    buffers.finish();
  });
  module.def("prefix_sum", [](const py::array& values, int threads) {
    emulator::Buffers buffers;
    int* data = buffers.inout<int>(values);
    RAKD_LAUNCH(prefix_sum, values.size() / threads, threads, threads * sizeof(int), nullptr, data);
    buffers.finish();
  });
  module.def("histogram", [](const py::array& input, const py::array& bins, int threads) {
    emulator::Buffers buffers;
    const int* from = buffers.in<int>(input);
    int* to = buffers.inout<int>(bins);
    RAKD_LAUNCH(histogram, (input.size() + threads - 1) / threads, threads, 0, nullptr, from, to, input.size());
    buffers.finish();
  });
  module.def("coordinates", [](const py::array& output, std::array<unsigned, 3> grid, std::array<unsigned, 3> block) {
    emulator::Buffers buffers;
    int64_t* to = buffers.out<int64_t>(output);
    RAKD_LAUNCH(coordinates, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0, nullptr, to);
    buffers.finish();
  });
  module.def("mistaken", [](const std::string& name, const py::array& input, const py::array& output, int threads,
                            int shared_bytes) {
#define NAME(name) #name,
    static const char* const names[] = {MISTAKES(NAME)};
#undef NAME
    const int mistake = static_cast<int>(std::find(std::begin(names), std::end(names), name) - std::begin(names));
    emulator::Buffers buffers;
    float* from = const_cast<float*>(buffers.in<float>(input));
    float* to = buffers.out<float>(output);
    RAKD_LAUNCH(mistaken, input.size() / threads, threads, shared_bytes, nullptr, static_cast<Mistake>(mistake), from,
                to, shared_bytes / 4);
    buffers.finish();
  });
  // Conversions of 16-bit types, of whole arrays.
  module.def("from_half", [](py::array_t<uint16_t> bits) {
    return py::vectorize([](uint16_t x) { return __half2float(__half{x}); })(bits);
  });
  module.def("to_half", [](py::array_t<float> values) {
    return py::vectorize([](float x) { return __float2half_rn(x).bits; })(values);
  });
  module.def("from_bfloat16", [](py::array_t<uint16_t> bits) {
    return py::vectorize([](uint16_t x) { return __bfloat162float(__nv_bfloat16{x}); })(bits);
  });
  module.def("to_bfloat16", [](py::array_t<float> values) {
    return py::vectorize([](float x) { return __float2bfloat16_rn(x).bits; })(values);
  });
  module.def("minima", [](float a, float b) { return min(a, b); });
  module.def("maxima", [](double a, double b) { return max(a, b); });
}
