// Which instruction set the CPU kernels use on this machine.
#pragma once

#include <cstdlib>
#include <cstring>

#include "attention_problem.h"
#include "position_problem.h"

namespace llava_st::cpu {

/// Whether this processor runs the AVX2 kernels. LLAVA_ST_CPU_ISA=baseline takes the portable ones.
inline bool wants_avx2() {
#if defined(__x86_64__)
  const char* const wanted = std::getenv("LLAVA_ST_CPU_ISA");
  const bool baseline = wanted != nullptr && std::strcmp(wanted, "baseline") == 0;
  return !baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

#if defined(__x86_64__)
inline const AttentionKernels& attention_kernels() {
  return wants_avx2() ? avx2_attention_kernels() : baseline_attention_kernels();
}
inline const PositionKernels& position_kernels() {
  return wants_avx2() ? avx2_position_kernels() : baseline_position_kernels();
}
#else
inline const AttentionKernels& attention_kernels() { return baseline_attention_kernels(); }
inline const PositionKernels& position_kernels() { return baseline_position_kernels(); }
#endif

}  // namespace llava_st::cpu
