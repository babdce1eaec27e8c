// Chooses the kernels of the best instruction set of this processor, and runs tasks on all of torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <vector>

#include "kernels.h"

namespace rakd {

// The RAKD_CPU_ISA environment variable (baseline, avx2, avx512) lowers the choice, for tests and measurements.
const Kernels& best_kernels();

// Elements of the accumulation type that one worker's buffers need.
struct ScratchSizes {
  int64_t values[2] = {0, 0}, gradients[2] = {0, 0}, sums = 0, pooled = 0;

  void include(const ScratchSizes& other) {
    for (int side = 0; side < 2; ++side) {
      values[side] = std::max(values[side], other.values[side]);
      gradients[side] = std::max(gradients[side], other.gradients[side]);
    }
    sums = std::max(sums, other.sums);
    pooled = std::max(pooled, other.pooled);
  }
};

// One worker's buffers in one allocation, each on a cache line of its own.
template <class T>
class WorkerScratch {
 public:
  explicit WorkerScratch(const ScratchSizes& sizes) : layout_(sizes), memory_(layout_.bytes) {
    char* base = memory_.data();
    const size_t* at = layout_.offsets;
    scratch = Scratch{{base + at[0], base + at[1]},
                      {base + at[2], base + at[3]},
                      {base + at[4], base + at[5]},
                      {base + at[6], base + at[7]}};
  }
  Scratch scratch;

 private:
  struct Layout {
    explicit Layout(const ScratchSizes& sizes) {
      const int64_t counts[8] = {sizes.values[0], sizes.values[1], sizes.gradients[0], sizes.gradients[1],
                                 sizes.sums,      sizes.sums,      sizes.pooled,       sizes.pooled};
      for (int i = 0; i < 8; ++i) {
        offsets[i] = bytes;
        bytes += (static_cast<size_t>(counts[i]) * sizeof(T) + kLine - 1) / kLine * kLine;
      }
    }
    size_t offsets[8], bytes = 0;
  };
  Layout layout_;
  Buffer memory_;
};

// Calls run(i, worker) for i = 0 .. count - 1, each once. Which thread runs which task is left to chance, so that
// nobody waits; a task therefore owns all that it writes and the result does not depend on the schedule.
template <class F>
void for_each_task(int64_t count, const F& run) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) run(i, worker);
    }
  });
}

// The same with buffers: run(i, scratch).
template <class T, class F>
void run_tasks(int64_t count, const ScratchSizes& sizes, const F& run) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::vector<WorkerScratch<T>> workers;
  workers.reserve(threads);
  for (int64_t i = 0; i < threads; ++i) workers.emplace_back(sizes);
  for_each_task(count, [&](int64_t i, int64_t worker) { run(i, workers[worker].scratch); });
}

}  // namespace rakd
