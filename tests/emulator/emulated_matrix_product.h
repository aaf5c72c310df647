// What csrc/cuda/matrix_product.cuh offers device code, done by the emulator. Included by it, not by itself.
#pragma once

#include "emulated_hardware.h"

namespace llava_st::cuda {

/// One lane's share of the matrices.
template <class T>
struct MatrixFragments {
  T a[4][2], b[2][2];
  float d[4];
};

/// The hardware also multiplies exactly and adds in float, but in an order, and with a rounding, of its own.
template <class T>
void multiply_add_fragments(void* const (&lanes)[kWarpSize]) {
  float a[16][16], b[16][8];
  const auto fragments = [&](int lane) -> MatrixFragments<T>& {
    return *static_cast<MatrixFragments<T>*>(lanes[lane]);
  };
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 2; ++i) {
        a[group][pair + 8 * half + i] = float_of(fragments(lane).a[2 * half][i]);
        a[group + 8][pair + 8 * half + i] = float_of(fragments(lane).a[2 * half + 1][i]);
        b[pair + 8 * half + i][group] = float_of(fragments(lane).b[half][i]);
      }
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      for (int k = 0; k < 16; ++k) fragments(lane).d[i] += a[row][k] * b[k][column];
    }
  }
}

template <class T>
LLAVA_ST_LAYER void multiply_add_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                         emulator::CallSite site = emulator::CallSite::current()) {
  MatrixFragments<T> mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  std::memcpy(mine.d, d, sizeof(d));
  emulator::meet_in_warp(kFullWarp, "a matrix product", site, &mine, &multiply_add_fragments<T>);
  std::memcpy(d, mine.d, sizeof(d));
}

}  // namespace llava_st::cuda
