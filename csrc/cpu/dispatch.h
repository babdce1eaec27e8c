// Chooses the kernels of the best instruction set of this processor.
#pragma once

#include "kernels.h"

namespace rakd {

// The RAKD_CPU_ISA environment variable (baseline, avx2, avx512) chooses another set, for tests and measurements; a set
// that was not built or that this processor lacks is an error. Each op asks before it starts threads, so that the error
// reaches the caller.
const KernelTable& kernel_table();

template <class T>
const Kernels<T>& best_kernels() {
  if constexpr (sizeof(T) == sizeof(float))
    return kernel_table().single_precision;
  else
    return kernel_table().double_precision;
}

}  // namespace rakd
