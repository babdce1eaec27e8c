// What the emulator shares with the bindings: options, counts, and memory between guard zones.
//
// Bindings are compiled without a sanitizer and linked with kernels that have one, so nothing here may depend on it:
// whether AddressSanitizer is there is asked at run time.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <cstring>
#include <stdexcept>
#include <vector>

extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(void const volatile* address, size_t size);
__attribute__((weak)) void __asan_unpoison_memory_region(void const volatile* address, size_t size);
}

namespace emulator {

struct Options {
  uint64_t seed = 0;            // 0: threads in ascending order
  bool shuffle_blocks = false;  // blocks in an order that depends on the seed
  int workers = 0;              // OS threads among which the blocks are divided; 0: two under TSan, else one
};

struct Counts {
  int64_t launches = 0, blocks = 0, threads = 0, barriers = 0, warp_barriers = 0, shuffles = 0;
};

inline Options options;
inline Counts counts;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What uninitialised memory holds: NaN in every floating-point type, or -1.
constexpr unsigned char kPoison = 0xFF;

// Poisoned memory between guard zones.
class Guarded {
 public:
  Guarded() = default;
  // `data()` is a multiple of `alignment` plus `offset`.
  Guarded(size_t bytes, size_t alignment, size_t offset)
      : bytes_(bytes), memory_(2 * kZone + bytes + alignment + offset) {
    data_ = memory_.data() + kZone;
    while (reinterpret_cast<uintptr_t>(data_) % alignment != 0) ++data_;
    data_ += offset;
    fill();
    poison();
  }
  Guarded(Guarded&& other) = default;
  Guarded& operator=(Guarded&& other) {
    unlock();
    bytes_ = other.bytes_, data_ = other.data_;
    memory_ = std::move(other.memory_);
    return *this;
  }
  ~Guarded() { unlock(); }

  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  // Fills the guard zones, and under ASan makes any access to them an error.
  void fill() {
    unlock();
    for (size_t i = 0; i < kZone; ++i) data_[i - kZone] = data_[bytes_ + i] = guard(i);
    if (__asan_poison_memory_region != nullptr) {
      __asan_poison_memory_region(data_ - kZone, kZone);
      __asan_poison_memory_region(data_ + bytes_, kZone);
    }
  }
  void poison() {
    if (bytes_ != 0) std::memset(data_, kPoison, bytes_);
  }

  // Where the guard zones have been written to: "before", "past" or nullptr.
  const char* damage() const {
    if (__asan_poison_memory_region != nullptr) return nullptr;  // it has reported the write itself
    for (size_t i = 0; i < kZone; ++i) {
      if (data_[i - kZone] != guard(i)) return "before";
      if (data_[bytes_ + i] != guard(i)) return "past";
    }
    return nullptr;
  }

 private:
  static constexpr size_t kZone = 4096;
  // NaN in every floating-point type too, but neither -1 nor the poison, so that writing those shows.
  static constexpr unsigned char guard(size_t place) { return place % 2 == 0 ? 0xFE : 0xFF; }

  // Memory must not be given back while ASan guards it.
  void unlock() {
    if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(memory_.data(), memory_.size());
  }

  size_t bytes_ = 0;
  std::vector<unsigned char> memory_;
  unsigned char* data_ = nullptr;
};

}  // namespace emulator
