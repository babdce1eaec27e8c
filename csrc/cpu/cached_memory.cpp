// See cached_memory.h.
#include "cached_memory.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rakd {

#if defined(__linux__)
namespace {

class MemoryCache {
 public:
  // Never destroyed: tensors may outlive static objects.
  static MemoryCache& instance() {
    static MemoryCache& cache = *new MemoryCache;
    return cache;
  }

  // A cached block of the request's size class, or a new one; without data where caching is off or no memory is left.
  CachedBlock take(size_t bytes) {
    if (limit_ == 0) return {};
    const size_t size = size_class(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found =
        std::find_if(blocks_.rbegin(), blocks_.rend(), [&](const CachedBlock& block) { return block.bytes == size; });
    CachedBlock block;
    if (found == blocks_.rend()) {
      block = map(size);
    } else {
      block = *found;
      blocks_.erase(std::next(found).base());
      total_ -= size;
    }
    // Whole huge pages of the request alone, so that no memory beyond its end is used up. A failure does no harm.
    if (block.data) madvise(block.data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
    return block;
  }

  void give(CachedBlock block) {
    if (block.bytes > limit_) {
      munmap(block.data, block.bytes);
      return;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    // The pages stay and may be written again at no cost, unless the system needs them first.
    madvise(block.data, block.bytes, MADV_FREE);
    blocks_.push_back(block);
    total_ += block.bytes;
    while (total_ > limit_ || blocks_.size() > kMaxBlocks) drop_oldest();
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!blocks_.empty()) drop_oldest();
  }

 private:
  static constexpr size_t kPage = 4096, kMaxBlocks = 64;

  MemoryCache() {
    const char* value = std::getenv("RAKD_CPU_KEEP_MIB");
    if (!value || !*value) value = "1024";
    const bool digits = std::strspn(value, "0123456789") == std::strlen(value) && std::strlen(value) <= 9;
    STD_TORCH_CHECK(digits, "RAKD_CPU_KEEP_MIB: expected a whole number of MiB from 0 to 999999999, got '", value, "'");
    limit_ = static_cast<size_t>(std::atoll(value)) << 20;
    blocks_.reserve(kMaxBlocks + 1);  // so that give() allocates nothing
  }

  // Four sizes for each doubling, because the sizes of tables and scratch change with the boxes from step to step. The
  // untouched part of a block is address space, not memory.
  static size_t size_class(size_t bytes) {
    size_t step = kPage;
    while (step < bytes / 8) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  static CachedBlock map(size_t bytes) {
    const size_t room = bytes + kHugePage;
    void* start = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return {};
    auto* begin = static_cast<char*>(start);
    char* data = begin + (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
    if (data > begin) munmap(begin, data - begin);
    if (data + bytes < begin + room) munmap(data + bytes, begin + room - (data + bytes));
    return CachedBlock{data, bytes};
  }

  void drop_oldest() {
    munmap(blocks_.front().data, blocks_.front().bytes);
    total_ -= blocks_.front().bytes;
    blocks_.erase(blocks_.begin());
  }

  std::mutex mutex_;
  std::vector<CachedBlock> blocks_;  // unused, the oldest first
  size_t total_ = 0, limit_ = 0;
};

}  // namespace

CachedBlock take_cached(size_t bytes) { return MemoryCache::instance().take(bytes); }
void return_to_cache(CachedBlock block) { MemoryCache::instance().give(block); }
void release_cache() { MemoryCache::instance().release(); }
void check_cache_limit() { MemoryCache::instance(); }

#else

CachedBlock take_cached(size_t) { return {}; }
void return_to_cache(CachedBlock) {}
void release_cache() {}
void check_cache_limit() {}

#endif

Buffer::Buffer(size_t bytes) {
  if (bytes >= kHugePage) block_ = take_cached(bytes);
  data_ =
      block_.data ? block_.data : static_cast<char*>(std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine));
  if (!data_) throw std::bad_alloc();
}

Buffer::~Buffer() { block_.data ? return_to_cache(block_) : std::free(data_); }

}  // namespace rakd
