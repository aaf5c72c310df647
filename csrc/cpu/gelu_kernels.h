// The exact GELU behind a linear layer, at positions of a grid, and its gradient. Compiled once per instruction set.
#pragma once

#include <math.h>

#include "position_problem.h"
#include "scratch.h"
#include "softmax.h"

namespace llava_st::LLAVA_ST_ISA {

/// Of the normal distribution at x: what lies below x, and the density. gelu(x) = x * below; its derivative is
/// below + x * density.
template <class V>
struct Normal {
  V below, density;
};

/// What lies below -a, for a >= 0, is exp(-a^2 / 2) times a function that falls slowly and smoothly: a polynomial in
/// 1 / (1 + 0.3 a), interpolated at Chebyshev's points for a < 14, to 1.1e-7 of it.
LLAVA_ST_INLINE Normal<Float8> normal(Float8 x) {
  const Float8 a = (Float8)((Bits8)x & 0x7fffffffu);
  const Float8 bell = exponential(a * a * -0.5f);
  const Float8 t = 1.0f / (a * 0.3f + 1.0f);
  Float8 ratio = Float8{} + 3.7548766e-2f;
  ratio = ratio * t - 1.65373755e-1f;
  ratio = ratio * t + 2.21350409e-1f;
  ratio = ratio * t - 6.87756641e-2f;
  ratio = ratio * t + 1.37646145e-1f;
  ratio = ratio * t + 9.65708639e-2f;
  ratio = ratio * t + 1.21487249e-1f;
  ratio = ratio * t + 1.19541628e-1f;
  ratio = ratio * t + 4.37724471e-6f;
  const Float8 tail = bell * ratio;
  const Bits8 positive = (Bits8)(x > 0.0f);
  const Float8 below = (Float8)((positive & (Bits8)(1.0f - tail)) | (~positive & (Bits8)tail));
  return {below, bell * 0.398942280f};
}

LLAVA_ST_INLINE Normal<Double8> normal(Double8 x) {
  Normal<Double8> result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result.below[lane] = 0.5 * erfc(-x[lane] * 0.70710678118654752440);
    result.density[lane] = exp(-0.5 * x[lane] * x[lane]) * 0.39894228040143267794;
  }
  return result;
}

/// Calls `visit(c, load, store)` for the channels of a row, vector by vector; `load(p)` and `store(p, v)` take care of
/// a last vector that is not whole.
template <class Visit>
LLAVA_ST_INLINE void for_channels(int64_t channels, Visit visit) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    visit(c, [](auto* from) { return load(from); }, [](auto* to, auto vector) { store(to, vector); });
  }
  const int64_t rest = channels - c;
  if (rest > 0) {
    visit(
        c, [rest](auto* from) { return load_first(from, rest); },
        [rest](auto* to, auto vector) { store_first(to, vector, rest); });
  }
}

template <class T>
bool position_gelu(const cpu::PositionGelu& call, const cpu::ParallelLoop& loop) {
  using S = Scalar<T>;
  const Extent grid = call.grid;
  const int64_t channels = call.channels;
  return cpu::run_parallel(loop, call.samples * grid.t * grid.h, [&](int64_t begin, int64_t end) {
    Scratch<S> scratch(0, 1, channels);
    if (scratch.failed()) return false;
    S* const base = scratch.row(0);  // of a line of patches
    for (int64_t line = begin; line < end; ++line) {
      const S* const bias = static_cast<const S*>(call.bias);
      const S* const t = static_cast<const S*>(call.temporal) + line / grid.h % grid.t * channels;
      const S* const h = static_cast<const S*>(call.height) + line % grid.h * channels;
      for_channels(channels, [&](int64_t c, auto load, auto store) {
        store(base + c, load(bias + c) + load(t + c) + load(h + c));
      });
      for (int64_t column = 0; column < grid.w; ++column) {
        const int64_t row = (line * grid.w + column) * channels;
        const T* const product = static_cast<const T*>(call.product) + row;
        T* const kept = call.preactivation ? static_cast<T*>(call.preactivation) + row : nullptr;
        T* const activation = static_cast<T*>(call.activation) + row;
        const S* const w = static_cast<const S*>(call.width) + column * channels;
        for_channels(channels, [&](int64_t c, auto load, auto store) {
          const auto x = load(product + c) + (load(base + c) + load(w + c));
          if (kept) store(kept + c, x);
          store(activation + c, x * normal(x).below);
        });
      }
    }
    return true;
  });
}

template <class T>
void gelu_gradient(const cpu::GeluGradient& call, const cpu::ParallelLoop& loop) {
  cpu::run_parallel(loop, call.tokens, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const T* const before = static_cast<const T*>(call.preactivation) + token * call.stride;
      T* const gradient = static_cast<T*>(call.gradient) + token * call.channels;
      T* const activation = static_cast<T*>(call.activation) + token * call.channels;
      for_channels(call.channels, [&](int64_t c, auto load, auto store) {
        const auto x = load(before + c);
        const auto at = normal(x);
        store(gradient + c, load(gradient + c) * (at.below + x * at.density));
        store(activation + c, x * at.below);
      });
    }
    return true;
  });
}

}  // namespace llava_st::LLAVA_ST_ISA
