// The registered CUDA ops (csrc/cuda/ops.cu) for tensors on the CPU; see emulated_torch.h. Beside them, what tests set
// and ask.
#include "cuda/ops.cu"

#define RAKD_EXPORT extern "C" __attribute__((visibility("default")))

RAKD_EXPORT void rakd_emulated_schedule(uint64_t seed) { emulator::options = {seed, seed != 0, 0}; }

// Launches since the last call.
RAKD_EXPORT int64_t rakd_emulated_launches() { return std::exchange(emulator::counts, {}).launches; }
