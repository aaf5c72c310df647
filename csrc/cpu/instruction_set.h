// Which instruction set the CPU kernels use on this machine.
#pragma once

#include <cstdlib>
#include <cstring>

#include "attention_problem.h"

namespace llava_st::cpu {

/// The best kernels that this processor runs. LLAVA_ST_CPU_ISA=baseline takes the portable ones.
inline const AttentionKernels& attention_kernels() {
#if defined(__x86_64__)
  const char* const wanted = std::getenv("LLAVA_ST_CPU_ISA");
  const bool baseline = wanted != nullptr && std::strcmp(wanted, "baseline") == 0;
  if (!baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return avx2_attention_kernels();
  }
#endif
  return baseline_attention_kernels();
}

}  // namespace llava_st::cpu
