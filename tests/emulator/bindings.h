// Helps to bind emulated kernels to Python: numpy arrays in and out through guarded memory.
//
//   module.def("scale", [](const py::array& x, py::array y, float factor) {
//     emulator::Buffers buffers;
//     const float* input = buffers.in<float>(x);
//     float* output = buffers.out<float>(y);
//     launch_scale(input, output, x.size(), factor, nullptr);
//     buffers.finish();
//   });
//   emulator::bind(module);  // schedule() and counts()
//
// Every array is copied into memory of its own between guard zones, so that finish() sees writes outside of it (and
// ASan sees reads), writes to inputs, and outputs that were left unwritten hold NaN, or -1. The copy keeps the
// array's strides: transposed arrays stay transposed, as channels-last maps are.
//
// A binding includes the declarations of launch functions, and the kernels are compiled apart from it: pybind11 takes
// long to compile, more so with a sanitizer, and so it is done once for all mutants of the kernels.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>
#include <utility>

#include "guards.h"
#include "types.h"

namespace emulator {

namespace py = pybind11;

// Whether arrays of this dtype hold elements of type T. numpy has no bfloat16, and its float16 need not be used:
// both may come as uint16.
template <typename T>
bool holds(const py::dtype& dtype) {
  if constexpr (std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>) {
    const bool bits = dtype.kind() == 'u' && dtype.itemsize() == 2;
    return bits || (std::is_same_v<T, __half> && dtype.kind() == 'f' && dtype.itemsize() == 2);
  } else {
    return dtype.is(py::dtype::of<T>()) || py::dtype::of<T>().equal(dtype);
  }
}

enum class Access { kRead, kWrite, kReadWrite };

// One array's copy. The array must outlive it.
class ArrayCopy {
 public:
  ArrayCopy(const py::array& array, Access access, size_t misalign)
      : name_(std::to_string(array.size()) + " elements of " + std::string(py::str(array.dtype()))), access_(access) {
    original_ = static_cast<unsigned char*>(access == Access::kRead ? const_cast<void*>(array.data())
                                                                    : py::array(array).mutable_data());
    // Transposed is fine; with gaps or backwards, the elements would not be all of the memory.
    const auto bytes = static_cast<size_t>(array.nbytes()), itemsize = static_cast<size_t>(array.itemsize());
    size_t extent = array.size() == 0 ? 0 : itemsize;
    for (py::ssize_t axis = 0; axis < array.ndim() && array.size() > 0; ++axis) {
      if (array.shape(axis) == 1) continue;
      if (array.strides(axis) <= 0) throw Error("array with a stride of zero or less");
      extent += static_cast<size_t>((array.shape(axis) - 1) * array.strides(axis));
    }
    if (extent != bytes) throw Error("array with gaps in memory");
    memory_ = Guarded(bytes, kAlignment, misalign * itemsize);
    if (access != Access::kWrite) copy(memory_.data(), original_);
  }

  unsigned char* data() { return memory_.data(); }

  void finish() {
    if (const char* where = memory_.damage()) throw Error(std::string("write ") + where + " an array of " + name_);
    if (access_ != Access::kRead) {
      copy(original_, data());
    } else if (memory_.bytes() != 0 && std::memcmp(original_, data(), memory_.bytes()) != 0) {
      throw Error("write to an input array of " + name_);
    }
  }

 private:
  static constexpr size_t kAlignment = 512;  // of torch's allocations

  void copy(unsigned char* to, const unsigned char* from) const {
    if (memory_.bytes() != 0) std::memcpy(to, from, memory_.bytes());  // an empty array may have no address
  }

  std::string name_;
  Access access_;
  unsigned char* original_;
  Guarded memory_;
};

// The arrays of one call. `misalign` moves each by that many elements off its alignment, as a slice of a tensor is.
class Buffers {
 public:
  explicit Buffers(size_t misalign = 0) : misalign_(misalign) {}

  template <typename T>
  const T* in(const py::array& array) {
    return add<T>(array, Access::kRead);
  }
  // Holds poison, whatever the array holds.
  template <typename T>
  T* out(const py::array& array) {
    return add<T>(array, Access::kWrite);
  }
  template <typename T>
  T* inout(const py::array& array) {
    return add<T>(array, Access::kReadWrite);
  }

  // Of any element type.
  unsigned char* raw(const py::array& array, Access access) {
    arrays_.emplace_back(array, access, misalign_);
    return arrays_.back().data();
  }

  // After the launches: checks the guard zones and inputs, and copies the outputs back.
  void finish() {
    for (ArrayCopy& array : arrays_) array.finish();
  }

 private:
  template <typename T>
  T* add(const py::array& array, Access access) {
    if (!holds<T>(array.dtype())) throw Error("array of another dtype: " + std::string(py::str(array.dtype())));
    return reinterpret_cast<T*>(raw(array, access));
  }

  size_t misalign_;
  std::vector<ArrayCopy> arrays_;
};

inline void bind(py::module_& module) {
  const Options defaults;
  module.def(
      "schedule",
      [](uint64_t seed, bool shuffle_blocks, int workers) { options = Options{seed, shuffle_blocks, workers}; },
      "Set the order of threads and blocks in the launches that follow.", py::arg("seed") = defaults.seed,
      py::arg("shuffle_blocks") = defaults.shuffle_blocks, py::arg("workers") = defaults.workers);
  module.def(
      "counts",
      [] {
        const Counts taken = std::exchange(counts, Counts{});
        py::dict result;
        result["launches"] = taken.launches;
        result["blocks"] = taken.blocks;
        result["threads"] = taken.threads;
        result["barriers"] = taken.barriers;
        result["warp_barriers"] = taken.warp_barriers;
        result["shuffles"] = taken.shuffles;
        return result;
      },
      "What the launches since the last call of this function ran.");
}

}  // namespace emulator
