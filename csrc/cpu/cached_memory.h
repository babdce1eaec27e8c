// A cache of large blocks of memory, for the next call. Fresh pages cost more than the computation on them: the system
// zeroes them, a training step's gradient of 150 MiB in about 10 ms, and again each step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

struct AtenTensorOpaque;  // torch's C interface: a tensor

namespace rakd {

constexpr size_t kLine = 64;  // bytes of a cache line
constexpr uintptr_t kHugePage = uintptr_t(1) << 21;

// The system may take the pages of cached blocks when it runs short. RAKD_CPU_KEEP_MIB limits the cache (1024 unless
// set); with 0, and outside Linux, nothing is cached.
struct CachedBlock {
  char* data = nullptr;  // at the beginning of a page, in huge pages where the system has them; nullptr: not to be had
  size_t bytes = 0;
};
CachedBlock take_cached(size_t bytes);
void return_to_cache(CachedBlock block);

// Gives all unused blocks back to the system.
void release_cache();

// Throws where RAKD_CPU_KEEP_MIB has a wrong value. Each op asks before it starts threads, so that the error reaches
// the caller.
void check_cache_limit();

// A new CPU tensor in cached memory, which returns to the cache with the tensor; nullptr: not to be had
// (from_blob.cpp).
AtenTensorOpaque* tensor_in_cached_memory(size_t bytes, int64_t dimensions, const int64_t* sizes,
                                          const int64_t* strides, int32_t dtype);

// Uninitialised memory for as long as this lives, on a cache line of its own; cached afterwards if it is large.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(block_, other.block_);
    return *this;
  }
  ~Buffer();
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  CachedBlock block_;
};

}  // namespace rakd
