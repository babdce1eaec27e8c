// Runs tasks on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace rakd {

// Threads for `count` tasks. `work`: values that they compute, about a nanosecond each; little of it is done sooner by
// the calling thread than others are woken.
inline int64_t thread_count(int64_t count, int64_t work) {
  constexpr int64_t kMinParallelWork = int64_t(1) << 16;
  return work < kMinParallelWork ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), count);
}

// Calls run(i, thread) for i = 0 .. count - 1, each once, on threads numbered from 0. A thread takes the next task when
// it has done one, so that none waits; a task owns all that it writes, and the result does not depend on the schedule.
template <class F>
void for_each_task(int64_t count, int64_t threads, const F& run) {
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) run(i, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) run(i, thread);
    }
  });
}

}  // namespace rakd
