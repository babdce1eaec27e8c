// The emulator's engine: fibers, the scheduler that runs a block's threads on them, and what it checks.
//
// The threads of a block are fibers on one OS thread. A fiber runs until it reaches __syncthreads() or a warp
// shuffle, where the scheduler picks another one, in an order that the seed decides: a missing barrier gives wrong
// numbers for some seed. Works under AddressSanitizer and ThreadSanitizer. Under TSan a block's threads are ordered
// by barriers alone and blocks run on several OS threads, so it reports missing barriers and races between blocks.
#pragma once

#include <stdint.h>
#include <sys/mman.h>

#include <cstring>
#include <exception>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "guards.h"
#include "types.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

// Of the running fiber; the scheduler sets them. Initial-exec, because looking them up is otherwise a function call.
#define RAKD_EMULATED_REGISTER inline thread_local __attribute__((tls_model("initial-exec")))
RAKD_EMULATED_REGISTER uint3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0};
RAKD_EMULATED_REGISTER dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#if !defined(__x86_64__) && !defined(RAKD_EMULATE_UCONTEXT)
#define RAKD_EMULATE_UCONTEXT
#endif
#if defined(RAKD_EMULATE_UCONTEXT)
#include <ucontext.h>
#else
// Saves what the calling convention asks to keep, stores the stack pointer in *from and continues on `to`.
// swapcontext, the alternative, makes two system calls each time. Weak: the header may be in several objects.
extern "C" void rakd_emulate_switch(void** from, void* to);
__asm__(
    ".pushsection .text\n"
    ".weak rakd_emulate_switch\n"
    ".hidden rakd_emulate_switch\n"
    ".type rakd_emulate_switch, @function\n"
    "rakd_emulate_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size rakd_emulate_switch, .-rakd_emulate_switch\n"
    ".popsection\n");
#endif

namespace emulator {

// While an object of this type lives, TSan does not look at what this fiber reads and writes: the emulator's own
// memory is passed between fibers without anything that would order the kernel's accesses.
struct Unobserved {
#if defined(__SANITIZE_THREAD__)
  Unobserved() { begin(); }
  ~Unobserved() { end(); }
  static void begin() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  static void end() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#else
  Unobserved() {}  // not trivial, or it would be an unused variable
  static void begin() {}
  static void end() {}
#endif
};
// The reverse, for the kernel inside of the above.
struct Observed {
  Observed() { Unobserved::end(); }
  ~Observed() { Unobserved::begin(); }
};

// For TSan: all before a release of an address happens before what follows an acquire of it.
inline void release([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(address);
#endif
}
inline void acquire([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(address);
#endif
}

struct Context {
  void* stack_pointer = nullptr;
  const void* bottom = nullptr;  // of the stack, with its size: for ASan
  size_t size = 0;
  void* fake_stack = nullptr;  // ASan's
  void* fiber = nullptr;       // TSan's
#if defined(RAKD_EMULATE_UCONTEXT)
  ucontext_t ucontext;
#endif
};

// Called first on a stack that was switched to. The one that switched here is the one to be switched back to.
inline void arrive([[maybe_unused]] Context& here, [[maybe_unused]] Context& there) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(here.fake_stack, &there.bottom, &there.size);
#endif
}

// Not instrumented: TSan's record of calls is the other fiber's before the stack is.
__attribute__((noinline, no_sanitize("thread"))) inline void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(RAKD_EMULATE_UCONTEXT)
  swapcontext(&from.ucontext, &to.ucontext);
#else
  rakd_emulate_switch(&from.stack_pointer, to.stack_pointer);
#endif
  arrive(from, to);
}

enum class State { kRunning, kReturned, kBarrier, kWarp, kIndex, kUp, kDown, kXor };
constexpr const char* kStateNames[] = {"running",     "returned",       "__syncthreads",    "__syncwarp",
                                       "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};

// What a fiber does or waits for. Those that wait for each other must agree in all of it.
struct Wait {
  State state = State::kRunning;
  int line = 0;
  const char* file = "";
  unsigned mask = 0;
  int width = 0;
  bool operator==(const Wait& other) const {
    return state == other.state && line == other.line && mask == other.mask && width == other.width &&
           (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

class Engine;

struct Fiber {
  Context context;
  Engine* engine = nullptr;
  int thread = 0;  // linear index in the block
  uint3 index{};
  Wait wait;
  uint64_t sent = 0, received = 0;  // by a shuffle
  int source = 0;                   // lane that a shuffle reads
  unsigned barriers = 0;            // of the block, reached so far
  unsigned warp_barriers = 0;       // of the warp
  char warp_barrier[2] = {};        // of the warp's first fiber: only their addresses matter, to acquire and release
};

struct Launch {
  std::string name;
  dim3 grid, block;
  size_t shared_bytes;
  void (*body)(const void* parameters);
  const void* parameters;
};

struct Generator {
  uint64_t state;
  // Less than `count`.
  uint64_t operator()(uint64_t count) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;  // xorshift: never 0 if it was not
    return static_cast<uint64_t>((static_cast<unsigned __int128>(state) * count) >> 64);
  }
};

// Thrown in the fibers of a block that has failed, to make them leave the kernel.
struct Abandoned {};

// Runs blocks one after another; one engine for each OS thread. Fibers are kept for the blocks and launches to come.
class Engine {
 public:
  Fiber* running = nullptr;
  Counts counts;

  // The block's shared memory.
  unsigned char* shared() const { return shared_.data(); }

  // Runs blocks order[first], order[first + step], ... of a launch.
  void run(const Launch& launch, const std::vector<int64_t>& order, size_t first, size_t step, uint64_t seed);

  // Suspends the running fiber until those it waits for have arrived. Returns what it received, if it is a shuffle.
  uint64_t wait(const Wait& wait, uint64_t sent = 0, int source = 0);

 private:
  static void fiber_main();
  void add_fiber();
  void prepare(const Launch& launch);
  void run_block(int64_t block);
  void resume(Fiber& fiber);
  void make_ready(Fiber& fiber);
  size_t ring(size_t place) const { return (head_ + place) % ready_.size(); }
  void exchange(const Fiber& last);
  void release_barrier();
  [[noreturn]] void abandon(std::exception_ptr error);

  const Launch* launch_ = nullptr;
  int threads_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_;  // a ring
  size_t head_ = 0, ready_count_ = 0;
  std::vector<int> shuffling_;  // number of lanes of each warp that wait in a shuffle
  Guarded shared_;
  Context scheduler_;
  Generator random_{0};  // 0: ascending order
  bool abandoning_ = false;
  std::exception_ptr error_;
  char begin_ = 0, end_ = 0, barrier_[2] = {};  // only their addresses matter, to acquire and release
};

RAKD_EMULATED_REGISTER Engine* engine = nullptr;

// Runs a launch: checks it, orders its blocks and divides them among the workers. Throws what the kernel threw.
void run(const Launch& launch);

}  // namespace emulator

#include "scheduler.h"
