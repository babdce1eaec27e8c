// See kept_memory.h.
#include "kept_memory.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rakd {

#if defined(__linux__)
namespace {

class KeptMemory {
 public:
  // Never destroyed: tensors may outlive static objects.
  static KeptMemory& instance() {
    static KeptMemory& kept = *new KeptMemory;
    return kept;
  }

  // A kept block of the request's size class, or a new one; without data where nothing is to be kept or no memory is
  // left.
  KeptBlock take(size_t bytes) {
    if (most_ == 0) return {};
    const size_t size = size_class(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto kept =
        std::find_if(blocks_.rbegin(), blocks_.rend(), [&](const KeptBlock& block) { return block.bytes == size; });
    KeptBlock block;
    if (kept == blocks_.rend()) {
      block = map(size);
    } else {
      block = *kept;
      blocks_.erase(std::next(kept).base());
      total_ -= size;
    }
    // Whole huge pages of the request alone, so that no memory beyond its end is used up. Advice: it serves without,
    // too.
    if (block.data) madvise(block.data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
    return block;
  }

  void give(KeptBlock block) {
    if (block.bytes > most_) {
      munmap(block.data, block.bytes);
      return;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    // The pages stay, and may be written again at no cost, unless the system needs them first.
    madvise(block.data, block.bytes, MADV_FREE);
    blocks_.push_back(block);
    total_ += block.bytes;
    while (total_ > most_ || blocks_.size() > kMostBlocks) drop_oldest();
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!blocks_.empty()) drop_oldest();
  }

 private:
  static constexpr size_t kPage = 4096, kMostBlocks = 64;

  KeptMemory() {
    const char* wish = std::getenv("RAKD_CPU_KEEP_MIB");
    const long long mebibytes = wish && *wish ? std::atoll(wish) : 1024;
    most_ = mebibytes > 0 ? static_cast<size_t>(mebibytes) << 20 : 0;
    blocks_.reserve(kMostBlocks + 1);  // so that give() allocates nothing
  }

  // Four sizes for each doubling: boxes, and with them the sizes of tables and scratch, change from step to step. What
  // is not touched of a block is address space, not memory.
  static size_t size_class(size_t bytes) {
    size_t step = kPage;
    while (step * 8 < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  static KeptBlock map(size_t bytes) {
    const size_t room = bytes + kHugePage;
    void* start = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return {};
    auto* begin = static_cast<char*>(start);
    char* data = begin + (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
    if (data > begin) munmap(begin, data - begin);
    if (data + bytes < begin + room) munmap(data + bytes, begin + room - (data + bytes));
    return KeptBlock{data, bytes};
  }

  void drop_oldest() {
    munmap(blocks_.front().data, blocks_.front().bytes);
    total_ -= blocks_.front().bytes;
    blocks_.erase(blocks_.begin());
  }

  std::mutex mutex_;
  std::vector<KeptBlock> blocks_;  // nobody's, the oldest first
  size_t total_ = 0, most_ = 0;
};

}  // namespace

KeptBlock take_kept(size_t bytes) { return KeptMemory::instance().take(bytes); }
void give_kept(KeptBlock block) { KeptMemory::instance().give(block); }
void release_kept() { KeptMemory::instance().release(); }

#else

KeptBlock take_kept(size_t) { return {}; }
void give_kept(KeptBlock) {}
void release_kept() {}

#endif

Buffer::Buffer(size_t bytes) {
  if (bytes >= kHugePage) kept_ = take_kept(bytes);
  data_ = kept_.data ? kept_.data : static_cast<char*>(std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine));
  if (!data_) throw std::bad_alloc();
}

Buffer::~Buffer() { kept_.data ? give_kept(kept_) : std::free(data_); }

}  // namespace rakd
