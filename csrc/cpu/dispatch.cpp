// Run-time choice of the instruction set; see dispatch.h.
#include "dispatch.h"

#include <cstring>

namespace rakd {
namespace {

#if defined(RAKD_HAS_AVX2)
// Whether the processor converts float16, as all with AVX2 do; not all compilers have a name for it.
bool converts_halves() {
#if defined(__clang__) || __GNUC__ < 11
  return true;
#else
  return __builtin_cpu_supports("f16c");
#endif
}
#endif

const Kernels& choose() {
  const char* wish = std::getenv("RAKD_CPU_ISA");
  [[maybe_unused]] const auto allowed = [wish](const char* name) {
    return !wish || !*wish || std::strcmp(wish, name) == 0;
  };
#if defined(RAKD_HAS_AVX512)
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && converts_halves()) {
    return avx512::kernels();
  }
#endif
#if defined(RAKD_HAS_AVX2)
  if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      converts_halves()) {
    return avx2::kernels();
  }
#endif
  return baseline::kernels();
}

}  // namespace

const Kernels& best_kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace rakd
