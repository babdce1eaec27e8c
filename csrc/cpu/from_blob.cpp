// Tensors in cached memory, by torch_from_blob of torch's C interface. Torch has that function since 2.11, but the
// library must also load under 2.10: the reference is weak, and null there. The declaration is torch's own, for
// version 2.11; this file includes C declarations alone, because torch's inline C++ functions depend on the version.
#include <torch/headeronly/version.h>

#include <memory>

#include "cached_memory.h"

#if defined(__linux__) && TORCH_ABI_VERSION >= 0x020b000000000000
#undef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020b000000000000
#include <torch/csrc/stable/c/shim.h>
#pragma weak torch_from_blob

namespace rakd {

AtenTensorOpaque* tensor_in_cached_memory(size_t bytes, int64_t dimensions, const int64_t* sizes,
                                          const int64_t* strides, int32_t dtype) {
  if (bytes < kHugePage || !torch_from_blob) return nullptr;
  const CachedBlock taken = take_cached(bytes);
  if (!taken.data) return nullptr;
  const auto free_block = [](void*, void* context) {
    const std::unique_ptr<CachedBlock> block(static_cast<CachedBlock*>(context));
    return_to_cache(*block);
  };
  auto block = std::make_unique<CachedBlock>(taken);
  AtenTensorHandle tensor = nullptr;
  if (torch_from_blob(taken.data, dimensions, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), -1, &tensor,
                      aoti_torch_layout_strided(), nullptr, 0, free_block, block.get()) != AOTI_TORCH_SUCCESS) {
    return_to_cache(taken);
    return nullptr;
  }
  block.release();  // the tensor's
  return tensor;
}

}  // namespace rakd
#else

namespace rakd {
AtenTensorOpaque* tensor_in_cached_memory(size_t, int64_t, const int64_t*, const int64_t*, int32_t) { return nullptr; }
}  // namespace rakd
#endif
