// Small matrix products on the tensor cores (sm_80 and later). The lanes of a warp share the matrices out.
//
// Lane number l = 4 g + p holds, of a 16 x 16 matrix A (rows x k), in words of two elements with neighbouring k:
//   a[0] = A[g][2p, 2p+1]    a[1] = A[g+8][2p, 2p+1]    a[2] = A[g][2p+8, 2p+9]    a[3] = A[g+8][2p+8, 2p+9]
// of a 16 x 8 matrix B (k x columns):
//   b[0] = B[2p, 2p+1][g]    b[1] = B[2p+8, 2p+9][g]
// and of the 16 x 8 result:
//   d[0] = D[g][2p]    d[1] = D[g][2p+1]    d[2] = D[g+8][2p]    d[3] = D[g+8][2p+1]
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
#pragma once

#include "hardware.cuh"

#if !defined(__CUDACC__)
#include "emulated_matrix_product.h"
#else

namespace llava_st::cuda {

/// D += A B for elements of T (BFloat16 or Float16), summed in float. All lanes of the warp take part.
template <class T>
LLAVA_ST_DEVICE void multiply_add_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define LLAVA_ST_MULTIPLY_ADD(T, type)                                                                          \
  template <>                                                                                                   \
  LLAVA_ST_DEVICE void multiply_add_16x8x16<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                         \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                           \
  }
LLAVA_ST_MULTIPLY_ADD(BFloat16, "bf16")
LLAVA_ST_MULTIPLY_ADD(Float16, "f16")
#undef LLAVA_ST_MULTIPLY_ADD

}  // namespace llava_st::cuda

#endif
