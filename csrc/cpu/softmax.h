// Softmax over rows of scores, forward and backward, in place. Compiled once per instruction set.
#pragma once

#include <math.h>

#include "../geometry/regions.h"
#include "vectors.h"

namespace llava_st::LLAVA_ST_ISA {

/// exp(x) for x <= 0, to about one unit in the last place; NaN stays NaN, and where the result would be subnormal it is
/// 0.
///
/// exp(x) = 2^n exp(r) with n = round(x / ln 2), so |r| <= ln 2 / 2, where a polynomial does.
LLAVA_ST_INLINE Float8 exponential(Float8 x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // high: few bits, so n * high is exact
  constexpr float kSmallest = -87.3f;
  constexpr float kRounding = 0x1.8p23f;  // adding it leaves the integer nearest to a number in the low bits
  const Float8 shifted = x * kLog2E + kRounding;
  const Float8 n = shifted - kRounding;
  const Float8 r = (x - n * kLn2High) - n * kLn2Low;
  // (exp(r) - 1 - r) / r^2, interpolated at Chebyshev's points.
  Float8 series = Float8{} + 1.392621314e-3f;
  series = series * r + 8.363203146e-3f;
  series = series * r + 4.166655615e-2f;
  series = series * r + 1.666657627e-1f;
  series = series * r + 0.5f;
  const Float8 exp_r = series * (r * r) + (r + 1.0f);
  const Bits8 power = ((Bits8)shifted + 127) << 23;  // the bits of 2^n
  const Bits8 vanishes = (Bits8)(x < kSmallest);
  return (Float8)((Bits8)(exp_r * (Float8)power) & ~vanishes);
}

LLAVA_ST_INLINE Double8 exponential(Double8 x) {
  Double8 result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = exp(x[lane]);
  return result;
}

/// Rows of scores, one for each row of the query side, `stride` apart. Rows may be shorter than the stride; what lies
/// between them does not matter. There is memory up to the next whole vector.
template <class S>
struct ScoreRows {
  S* scores;
  int64_t rows, stride;

  /// How many numbers to reserve for rows like these.
  static LLAVA_ST_INLINE int64_t reserve(int64_t rows, int64_t stride) {
    return ceil_div(rows * stride, kLanes) * kLanes;
  }

  LLAVA_ST_INLINE S* row(int64_t index) const { return scores + index * stride; }
};

/// Scores become weights; `length(row)` is how many a row has. NaN and infinite scores give NaN, as in torch; but where
/// keys may be `masked`, a row of nothing but -inf gives zeros.
template <bool masked = false, class S, class Length>
LLAVA_ST_INLINE void softmax(const ScoreRows<S>& all, Length length) {
  for (int64_t index = 0; index < all.rows; ++index) {
    S* const row = all.row(index);
    const int64_t n = length(index);
    S largest = row[0];
    for (int64_t j = 1; j < n; ++j) largest = row[j] > largest ? row[j] : largest;
    if constexpr (masked) largest = largest == -INFINITY ? 0 : largest;
    for (int64_t j = 0; j < n; ++j) row[j] -= largest;
  }
  for (int64_t i = 0; i < all.rows * all.stride; i += kLanes) store(all.scores + i, exponential(load(all.scores + i)));
  for (int64_t index = 0; index < all.rows; ++index) {
    S* const row = all.row(index);
    const int64_t n = length(index);
    S sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += row[j];
    const S inverse = masked && sum == 0 ? 0 : 1 / sum;
    for (int64_t j = 0; j < n; ++j) row[j] *= inverse;
  }
}

/// Gradients of the weights become gradients of the scores.
template <class S, class Length>
LLAVA_ST_INLINE void softmax_backward(const ScoreRows<S>& weights, const ScoreRows<S>& grads, Length length) {
  for (int64_t index = 0; index < weights.rows; ++index) {
    const S* const p = weights.row(index);
    S* const ds = grads.row(index);
    const int64_t n = length(index);
    S mean = 0;
    for (int64_t j = 0; j < n; ++j) mean += p[j] * ds[j];
    for (int64_t j = 0; j < n; ++j) ds[j] = p[j] * (ds[j] - mean);
  }
}

}  // namespace llava_st::LLAVA_ST_ISA
