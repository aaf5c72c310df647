// Rows of numbers for the kernels of LAPE, in memory that sanitizers watch.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>

namespace llava_st::tests {

/// Rows of numbers, `stride` apart, in an allocation that ends with the last. They start as some sine.
template <class T>
struct Matrix {
  int64_t rows, channels, stride;
  std::unique_ptr<T[]> data;

  Matrix(int64_t rows, int64_t channels, int64_t gap = 0, double phase = 0, double amplitude = 1)
      : rows(rows),
        channels(channels),
        stride(channels + gap),
        data(new T[rows > 0 ? (rows - 1) * stride + channels : 0]) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < channels; ++c) at(i, c) = T(amplitude * std::sin(7.0 * i + 3.0 * c + phase));
    }
  }
  T& at(int64_t row, int64_t channel) const { return data[row * stride + channel]; }
};

}  // namespace llava_st::tests
