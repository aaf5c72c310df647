// The kernels of LAPE and the coordinate loss for processors with AVX2, FMA and F16C; CMakeLists.txt gives the flags.
#if defined(__x86_64__)
#define LLAVA_ST_ISA avx2
#include "position_kernels.h"

namespace llava_st::cpu {

const PositionKernels& avx2_position_kernels() {
  static constexpr PositionKernels kernels = avx2::position_kernels();
  return kernels;
}

}  // namespace llava_st::cpu
#endif
