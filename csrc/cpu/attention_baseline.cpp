// The attention kernels for any processor that the compiler's default flags allow.
#define LLAVA_ST_ISA baseline
#include "attention_kernels.h"

namespace llava_st::cpu {

const AttentionKernels& baseline_attention_kernels() {
  static constexpr AttentionKernels kernels = baseline::attention_kernels("baseline");
  return kernels;
}

}  // namespace llava_st::cpu
