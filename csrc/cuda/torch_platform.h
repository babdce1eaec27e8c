// What the code that reads tensors and launches needs from its platform: torch's CUDA, or the tests' emulator, whose
// tensors lie on the CPU. What kernels need stands in platform.h.
#pragma once

#include "platform.h"

#if defined(RAKD_EMULATE)

#include "emulated_torch.h"

#else

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

// The ops' namespace, and the device whose tensors they take.
#define RAKD_OPS rakd_ops
#define RAKD_DEVICE CUDA

// After a launch: an error if the device refused it.
#define RAKD_CHECK_LAUNCH() STD_CUDA_KERNEL_LAUNCH_CHECK()

namespace rakd {
namespace gpu {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace gpu
}  // namespace rakd

#endif
