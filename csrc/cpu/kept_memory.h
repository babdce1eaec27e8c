// Large blocks of memory that are kept for the next call when they are given back. Fresh pages cost more than what is
// computed on them: the system zeroes them, a training step's gradient of 150 MiB in about 10 ms, and again each step.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rakd {

constexpr size_t kLine = 64;  // bytes of a cache line
constexpr uintptr_t kHugePage = uintptr_t(1) << 21;

// What is kept stays the system's to take when it runs short. RAKD_CPU_KEEP_MIB limits it (1024 unless set); with 0,
// and outside Linux, nothing is kept.
struct KeptBlock {
  char* data = nullptr;  // at the beginning of a page, in huge pages where the system has them; nullptr: not to be had
  size_t bytes = 0;
};
KeptBlock take_kept(size_t bytes);
void give_kept(KeptBlock block);

// Gives back to the system what nobody uses.
void release_kept();

// Uninitialised memory for as long as this lives, on a cache line of its own; kept afterwards if it is large.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  Buffer(Buffer&& other) noexcept : data_(other.data_), kept_(other.kept_) {
    other.data_ = nullptr;
    other.kept_ = {};
  }
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer();
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  KeptBlock kept_;
};

}  // namespace rakd
