// The attention kernels for processors with AVX2, FMA and F16C; CMakeLists.txt gives the flags.
#if defined(__x86_64__)
#define LLAVA_ST_ISA avx2
#include "attention_kernels.h"

namespace llava_st::cpu {

const AttentionKernels& avx2_attention_kernels() {
  static constexpr AttentionKernels kernels = avx2::attention_kernels("avx2");
  return kernels;
}

}  // namespace llava_st::cpu
#endif
