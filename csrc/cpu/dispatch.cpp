// Chooses the instruction set at run time; see kernel_table() in kernels.h.
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "kernels.h"

// All processors with AVX2 convert float16, but not all compilers have a name for it.
#if defined(__clang__) || __GNUC__ < 11
#define RAKD_CONVERTS_HALVES true
#else
#define RAKD_CONVERTS_HALVES __builtin_cpu_supports("f16c")
#endif

namespace rakd {
namespace {

struct InstructionSet {
  const char* name;
  bool runs_here;
  const KernelTable& (*kernels)();
};

const KernelTable& choose() {
  const InstructionSet sets[] = {
  // the best first
#if defined(RAKD_HAS_AVX512)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && RAKD_CONVERTS_HALVES,
       avx512::kernels},
#endif
#if defined(RAKD_HAS_AVX2)
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && RAKD_CONVERTS_HALVES, avx2::kernels},
#endif
      {"baseline", true, baseline::kernels}};
  const char* variable = std::getenv("RAKD_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  std::string possible;
  for (const InstructionSet& set : sets) {
    if (!set.runs_here) continue;
    if (wanted.empty() || wanted == set.name) return set.kernels();
    possible += std::string(possible.empty() ? "" : ", ") + set.name;
  }
  STD_TORCH_CHECK(false, "RAKD_CPU_ISA: expected one of ", possible, ", which can run here, got '", wanted, "'");
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace rakd
