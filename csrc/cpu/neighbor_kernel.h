// y = (I + M) x along the rows of a matrix, M_ij = 2^-|i-j|, in linear time. Knows nothing of torch.
#pragma once

#include <cstdint>

namespace llava_st::cpu {

/// Channels that are worked on together: their sums stay in registers.
constexpr int64_t kChannels = 32;

/// Adds up, for `channels` columns of `rows` rows, what comes from the rows before and what from the rows after: with
/// f_i = x_i + f_(i-1) / 2 and b_i = x_i + b_(i+1) / 2, y_i is f_i + b_i. `S` is what is computed in; `before` holds
/// rows * kChannels of it.
template <class S, class T>
void propagate(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows, int64_t channels, S* before) {
  S sum[kChannels] = {};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] = sum[c] * S(0.5) + static_cast<S>(x[i * x_stride + c]);
      before[i * kChannels + c] = sum[c];
    }
  }
  for (S& each : sum) each = 0;
  for (int64_t i = rows - 1; i >= 0; --i) {
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] = sum[c] * S(0.5) + static_cast<S>(x[i * x_stride + c]);
      y[i * y_stride + c] = static_cast<T>(before[i * kChannels + c] + sum[c]);
    }
  }
}

}  // namespace llava_st::cpu
