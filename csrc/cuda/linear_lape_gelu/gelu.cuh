// The exact GELU, x times the normal distribution function of x, and its derivative.
#pragma once

#include "../hardware.cuh"

namespace llava_st::cuda {

struct Gelu {
  float value, derivative;
};

/// How much of the normal distribution is below x.
LLAVA_ST_DEVICE float normal_below(float x) {
  constexpr float kSqrtHalf = 0.707106781f;
  return 0.5f + 0.5f * erf(x * kSqrtHalf);
}

LLAVA_ST_DEVICE float gelu(float x) { return x * normal_below(x); }

LLAVA_ST_DEVICE Gelu gelu_with_derivative(float x) {
  constexpr float kMinusHalfLog2E = -0.721347520f, kDensityAtZero = 0.398942280f;
  const float below = normal_below(x);
  const float density = kDensityAtZero * exp2(x * x * kMinusHalfLog2E);
  return {x * below, below + x * density};
}

}  // namespace llava_st::cuda
