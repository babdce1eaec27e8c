// What csrc/cuda/torch_platform.h includes when RAKD_EMULATE is defined: csrc/cuda/ops.cu then registers its ops for
// tensors on the CPU, in a namespace of their own, and the emulator runs what it launches.
#pragma once

#define RAKD_OPS rakd_emulated
#define RAKD_DEVICE CPU

#define RAKD_CHECK_LAUNCH() static_cast<void>(0)  // launches that fail throw

namespace rakd {
namespace gpu {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline cudaStream_t current_stream(int32_t) { return nullptr; }

}  // namespace gpu
}  // namespace rakd
