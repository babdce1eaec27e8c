// The emulator's scheduler: the definitions that belong to engine.h, which includes this file.
#pragma once

#include <algorithm>

#include "engine.h"

namespace emulator {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kStackBytes = 256 * 1024;  // instrumented frames are larger
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr size_t kPageBytes = 4096;

inline void Engine::fiber_main() {
  const Unobserved unobserved;  // first, as nothing orders this after what the OS thread did when it began
  Fiber& fiber = *engine->running;
  Engine& self = *fiber.engine;  // the fiber stays with it, though the OS thread may change between launches
  arrive(fiber.context, self.scheduler_);
  for (;;) {
    acquire(&self.begin_);
    try {
      const Observed observed;
      if (!self.abandoning_) self.launch_->body(self.launch_->parameters);
    } catch (const Abandoned&) {
    } catch (...) {
      self.error_ = std::current_exception();
    }
    release(&self.end_);
    fiber.wait = Wait{State::kReturned};
    switch_context(fiber.context, self.scheduler_);
  }
}

inline void Engine::add_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->engine = this;
  fiber->thread = static_cast<int>(fibers_.size());
  // Kept until the process ends. The page below the stack stays inaccessible, so that an overflow is a fault.
  void* pages = mmap(nullptr, kStackBytes + kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  mprotect(pages, kPageBytes, PROT_NONE);
  auto* bottom = static_cast<unsigned char*>(pages) + kPageBytes;
  // Tops at the same address modulo a page would all want the same few cache lines.
  const size_t size = kStackBytes - static_cast<size_t>(fiber->thread % 31) * 128;
  fiber->context.bottom = bottom;
  fiber->context.size = size;
#if defined(__SANITIZE_THREAD__)
  fiber->context.fiber = __tsan_create_fiber(0);
#endif
#if defined(RAKD_EMULATE_UCONTEXT)
  getcontext(&fiber->context.ucontext);
  fiber->context.ucontext.uc_stack.ss_sp = bottom;
  fiber->context.ucontext.uc_stack.ss_size = size;
  fiber->context.ucontext.uc_link = nullptr;
  makecontext(&fiber->context.ucontext, fiber_main, 0);
#else
  // Six registers, the address that the switch returns to, and for that function no caller. It begins like any
  // function with a stack pointer 8 bytes off a multiple of 16.
  auto** top = reinterpret_cast<void**>(bottom + size) - 1;
  *--top = reinterpret_cast<void*>(fiber_main);
  fiber->context.stack_pointer = top - 6;
#endif
  fibers_.push_back(std::move(fiber));
}

inline void Engine::prepare(const Launch& launch) {
  launch_ = &launch;
  threads_ = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  while (fibers_.size() < static_cast<size_t>(threads_)) add_fiber();
  for (int t = 0; t < threads_; ++t) {
    const unsigned thread = static_cast<unsigned>(t), row = thread / launch.block.x;
    fibers_[t]->index = {thread % launch.block.x, row % launch.block.y, row / launch.block.y};
  }
  ready_.resize(threads_);
  shuffling_.assign((threads_ + warpSize - 1) / warpSize, 0);
  // Aligned to 16 bytes and to no more, as CUDA promises no more.
  shared_ = Guarded(launch.shared_bytes, 32, 16);
#if defined(__SANITIZE_THREAD__)
  scheduler_.fiber = __tsan_get_current_fiber();
#endif
}

inline void Engine::run(const Launch& launch, const std::vector<int64_t>& order, size_t first, size_t step,
                        uint64_t seed) {
  if (engine != nullptr) throw Error("a kernel cannot launch a kernel");
  struct Current {
    explicit Current(Engine* current) { engine = current; }
    ~Current() { engine = nullptr; }
  } current(this);
  prepare(launch);
  const Unobserved unobserved;
  random_.state = seed == 0 ? 0 : (seed * 0x9E3779B97F4A7C15u + first) | 1;
  blockDim = launch.block;
  gridDim = launch.grid;
  counts = Counts{};
  for (size_t i = first; i < order.size(); i += step) run_block(order[i]);
}

inline void Engine::run_block(int64_t block) {
  const dim3& grid = launch_->grid;
  blockIdx = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
              static_cast<unsigned>(block / grid.x / grid.y)};
  shared_.poison();
  ++counts.blocks;
  counts.threads += threads_;
  head_ = ready_count_ = 0;
  for (int t = 0; t < threads_; ++t) {
    fibers_[t]->barriers = fibers_[t]->warp_barriers = 0;
    make_ready(*fibers_[t]);
  }
  release(&begin_);
  int returned = 0;
  while (returned < threads_) {
    if (ready_count_ == 0) release_barrier();
    if (random_.state != 0) std::swap(ready_[head_], ready_[ring(random_(ready_count_))]);
    Fiber& fiber = *ready_[head_];
    head_ = ring(1);
    --ready_count_;
    resume(fiber);
    if (error_) abandon(std::exchange(error_, nullptr));
    if (fiber.wait.state == State::kReturned) ++returned;
    if (fiber.wait.state > State::kBarrier) exchange(fiber);
  }
  acquire(&end_);
  if (const char* where = shared_.damage()) {
    abandon(std::make_exception_ptr(Error(std::string("write ") + where + " shared memory")));
  }
}

inline void Engine::resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
  switch_context(scheduler_, fiber.context);
  running = nullptr;
}

inline void Engine::make_ready(Fiber& fiber) {
  fiber.wait = Wait{};
  ready_[ring(ready_count_++)] = &fiber;
}

inline uint64_t Engine::wait(const Wait& wait, uint64_t sent, int source) {
  Fiber& fiber = *running;
  if (wait.state != State::kBarrier && (wait.mask >> (fiber.thread % warpSize) & 1) == 0) {
    throw Error(std::string(kStateNames[static_cast<int>(wait.state)]) + ": lane not in its own mask");
  }
  // Barriers order memory; shuffles do not. Of two addresses in turn: those early at the next barrier must not add to
  // what the late acquire at this one.
  char* order = nullptr;
  if (wait.state == State::kBarrier) order = &barrier_[fiber.barriers++ & 1];
  if (wait.state == State::kWarp) {
    order = &fibers_[fiber.thread / warpSize * warpSize]->warp_barrier[fiber.warp_barriers++ & 1];
  }
  if (order != nullptr) release(order);
  fiber.wait = wait;
  fiber.sent = sent;
  fiber.source = source;
  switch_context(fiber.context, scheduler_);
  if (abandoning_) throw Abandoned();
  if (order != nullptr) acquire(order);
  return fiber.received;
}

// Completes the shuffle, or barrier of the warp, that `last` waits for if it was the last to arrive. Lanes that the
// block does not have may be in the mask, as they may in CUDA; lanes that returned may not, although CUDA lets that
// pass.
inline void Engine::exchange(const Fiber& last) {
  const int warp = last.thread / warpSize, begin = warp * warpSize, lanes = std::min(threads_ - begin, warpSize);
  const unsigned existing = lanes == warpSize ? ~0u : (1u << lanes) - 1, mask = last.wait.mask & existing;
  const int needed = __builtin_popcount(mask);
  if (++shuffling_[warp] < needed) return;
  const Wait wait = last.wait;
  for (int lane = 0; lane < lanes; ++lane) {
    if ((mask >> lane & 1) != 0 && !(fibers_[begin + lane]->wait == wait)) return;
  }
  for (int lane = 0; lane < lanes; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Fiber& fiber = *fibers_[begin + lane];
    if ((mask >> fiber.source & 1) != 0) {
      fiber.received = fibers_[begin + fiber.source]->sent;
    } else {
      std::memset(&fiber.received, kPoison, sizeof fiber.received);
    }
  }
  for (int lane = 0; lane < lanes; ++lane) {
    if ((mask >> lane & 1) != 0) make_ready(*fibers_[begin + lane]);
  }
  shuffling_[warp] -= needed;
  ++(wait.state == State::kWarp ? counts.warp_barriers : counts.shuffles);
}

// No fiber can go on: all must be at one barrier.
inline void Engine::release_barrier() {
  std::vector<std::pair<const Fiber*, int>> groups;  // the first of those that do the same, how many there are
  for (int t = 0; t < threads_; ++t) {
    const Fiber& fiber = *fibers_[t];
    if (!groups.empty() && groups.back().first->wait == fiber.wait) {
      ++groups.back().second;
      continue;
    }
    auto group = groups.begin();
    while (group != groups.end() && !(group->first->wait == fiber.wait)) ++group;
    if (group == groups.end()) group = groups.insert(group, {&fiber, 0});
    ++group->second;
  }
  if (groups.size() == 1 && groups[0].first->wait.state == State::kBarrier) {
    ++counts.barriers;
    for (int t = 0; t < threads_; ++t) make_ready(*fibers_[t]);
    return;
  }
  std::ostringstream text;
  text << "threads diverge:";
  for (const auto& [first, count] : groups) {
    const Wait& wait = first->wait;
    text << (&first == &groups[0].first ? " " : "; ") << count << " ";
    if (wait.state == State::kReturned) {
      text << "returned";
    } else {
      text << "wait at " << kStateNames[static_cast<int>(wait.state)] << " (" << wait.file << ":" << wait.line;
      if (wait.state > State::kBarrier) text << ", mask 0x" << std::hex << wait.mask << std::dec;
      text << ")";
    }
    text << ", the first of them thread " << first->thread;
  }
  abandon(std::make_exception_ptr(Error(text.str())));
}

// Unwinds the block's fibers and throws, an emulator's error with the kernel and block added.
inline void Engine::abandon(std::exception_ptr error) {
  abandoning_ = true;
  for (int t = 0; t < threads_; ++t) {
    while (fibers_[t]->wait.state != State::kReturned) resume(*fibers_[t]);
  }
  abandoning_ = false;
  error_ = nullptr;
  shuffling_.assign(shuffling_.size(), 0);
  acquire(&end_);
  try {
    std::rethrow_exception(error);
  } catch (const Error& caught) {
    std::ostringstream text;
    text << "kernel " << launch_->name << ", block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z
         << "): " << caught.what();
    throw Error(text.str());
  }
}

inline void check(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const auto outside = [](unsigned value, uint64_t most) { return value < 1 || value > most; };
  std::ostringstream text;
  text << "kernel " << launch.name << ": ";
  if (outside(block.x, 1024) || outside(block.y, 1024) || outside(block.z, 64) ||
      uint64_t{block.x} * block.y * block.z > 1024) {
    text << "block of (" << block.x << ", " << block.y << ", " << block.z << ") threads";
    throw Error(text.str());
  }
  if (outside(grid.x, 0x7FFFFFFF) || outside(grid.y, 65535) || outside(grid.z, 65535)) {
    text << "grid of (" << grid.x << ", " << grid.y << ", " << grid.z << ") blocks";
    throw Error(text.str());
  }
  if (launch.shared_bytes > 48 * 1024) {  // what a kernel gets without opting in to more
    text << launch.shared_bytes << " bytes of shared memory";
    throw Error(text.str());
  }
}

inline void run(const Launch& launch) {
  check(launch);
  static auto& engines = *new std::vector<std::unique_ptr<Engine>>();  // never destroyed: see Engine::add_fiber
  std::vector<int64_t> order(static_cast<size_t>(int64_t{launch.grid.x} * launch.grid.y * launch.grid.z));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  if (options.shuffle_blocks) {
    Generator random{options.seed * 0xBF58476D1CE4E5B9u | 1};
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random(i)]);
  }
#if defined(__SANITIZE_THREAD__)
  constexpr int kDefaultWorkers = 2;
#else
  constexpr int kDefaultWorkers = 1;
#endif
  const size_t workers = static_cast<size_t>(options.workers > 0 ? options.workers : kDefaultWorkers);
  while (engines.size() < workers) engines.push_back(std::make_unique<Engine>());
  std::vector<std::exception_ptr> errors(workers);
  const auto work = [&](size_t worker) {
    try {
      engines[worker]->run(launch, order, worker, workers, options.seed);
    } catch (...) {
      errors[worker] = std::current_exception();
    }
  };
  if (workers == 1) {
    work(0);
  } else {
    std::vector<std::thread> threads;
    for (size_t worker = 0; worker < workers; ++worker) threads.emplace_back(work, worker);
    for (auto& thread : threads) thread.join();
  }
  ++counts.launches;
  for (size_t worker = 0; worker < workers; ++worker) {
    const Counts& of_worker = engines[worker]->counts;
    counts.blocks += of_worker.blocks;
    counts.threads += of_worker.threads;
    counts.barriers += of_worker.barriers;
    counts.warp_barriers += of_worker.warp_barriers;
    counts.shuffles += of_worker.shuffles;
  }
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace emulator
