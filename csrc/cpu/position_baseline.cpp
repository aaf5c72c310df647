// The kernels of LAPE and the coordinate loss for any processor that the compiler's default flags allow.
#define LLAVA_ST_ISA baseline
#include "position_kernels.h"

namespace llava_st::cpu {

const PositionKernels& baseline_position_kernels() {
  static constexpr PositionKernels kernels = baseline::position_kernels();
  return kernels;
}

}  // namespace llava_st::cpu
