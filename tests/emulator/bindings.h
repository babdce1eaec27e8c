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
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "emulator.h"

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
class Guarded {
 public:
  Guarded(const py::array& array, Access access, size_t misalign)
      : name_(std::to_string(array.size()) + " elements of " + std::string(py::str(array.dtype()))),
        access_(access),
        original_(static_cast<unsigned char*>(access == Access::kRead ? const_cast<void*>(array.data())
                                                                      : py::array(array).mutable_data())),
        bytes_(static_cast<size_t>(array.nbytes())) {
    // Transposed is fine; with gaps or backwards, the elements would not be all of the memory.
    size_t extent = array.size() == 0 ? 0 : static_cast<size_t>(array.itemsize());
    for (py::ssize_t axis = 0; axis < array.ndim() && array.size() > 0; ++axis) {
      if (array.shape(axis) == 1) continue;
      if (array.strides(axis) <= 0) throw Error("array with a stride of zero or less");
      extent += static_cast<size_t>((array.shape(axis) - 1) * array.strides(axis));
    }
    if (extent != bytes_) throw Error("array with gaps in memory");
    // Aligned like torch's allocations, less what was asked to be misaligned.
    const size_t offset = misalign * static_cast<size_t>(array.itemsize());
    memory_.resize(2 * kGuardBytes + bytes_ + offset + 2 * kAlignment);
    data_ = memory_.data() + kGuardBytes;
    while (reinterpret_cast<uintptr_t>(data_) % kAlignment != 0) ++data_;
    data_ += offset;
    fill_guard(data_ - kGuardBytes);
    fill_guard(data_ + bytes_);
    if (access == Access::kWrite) {
      std::memset(data_, kPoison, bytes_);
    } else {
      copy(data_, original_);
    }
  }
  Guarded(Guarded&&) = default;
  ~Guarded() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_.data(), memory_.size());
#endif
  }

  unsigned char* data() { return data_; }

  void finish() {
    if (!guard_is_intact(data_ - kGuardBytes)) throw Error("write before an array of " + name_);
    if (!guard_is_intact(data_ + bytes_)) throw Error("write past an array of " + name_);
    if (access_ != Access::kRead) {
      copy(original_, data_);
    } else if (bytes_ != 0 && std::memcmp(original_, data_, bytes_) != 0) {
      throw Error("write to an input array of " + name_);
    }
  }

 private:
  static constexpr size_t kAlignment = 512;

  void copy(unsigned char* to, const unsigned char* from) const {
    if (bytes_ != 0) std::memcpy(to, from, bytes_);  // an empty array may have no address
  }

  std::string name_;
  Access access_;
  unsigned char* original_;
  size_t bytes_;
  std::vector<unsigned char> memory_;
  unsigned char* data_ = nullptr;
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

  // After the launches: checks the guard zones and inputs, and copies the outputs back.
  void finish() {
    for (Guarded& guarded : arrays_) guarded.finish();
  }

 private:
  template <typename T>
  T* add(const py::array& array, Access access) {
    if (!holds<T>(array.dtype())) throw Error("array of another dtype: " + std::string(py::str(array.dtype())));
    arrays_.emplace_back(array, access, misalign_);
    return reinterpret_cast<T*>(arrays_.back().data());
  }

  size_t misalign_;
  std::vector<Guarded> arrays_;
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
        result["shuffles"] = taken.shuffles;
        return result;
      },
      "What the launches since the last call of this function ran.");
}

}  // namespace emulator
