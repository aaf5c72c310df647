// The propagation to neighbours, csrc/cpu/neighbor_kernel.h, against the matrix (I + M), in several threads.
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "checks.h"
#include "cpu/neighbor_kernel.h"

namespace llava_st::tests {
namespace {

/// Rows of `channels` floats, `stride` apart, in an allocation that ends with the last.
struct Matrix {
  int64_t rows, channels, stride;
  std::unique_ptr<float[]> data;

  Matrix(int64_t rows, int64_t channels, int64_t stride)
      : rows(rows), channels(channels), stride(stride), data(new float[(rows - 1) * stride + channels]) {
    std::fill_n(data.get(), (rows - 1) * stride + channels, NAN);
  }

  float& at(int64_t row, int64_t channel) const { return data[row * stride + channel]; }
};

void check_propagation(int64_t rows, int64_t channels, int64_t threads) {
  const Matrix x(rows, channels, channels + 3), y(rows, channels, channels);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < channels; ++c) x.at(i, c) = std::sin(static_cast<float>(7 * i + 3 * c));
  }
  const int64_t tiles = (channels + cpu::kChannels - 1) / cpu::kChannels;
  std::vector<std::thread> running;
  for (int64_t thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      const std::unique_ptr<float[]> before(new float[rows * cpu::kChannels]);
      for (int64_t tile = thread; tile < tiles; tile += threads) {
        const int64_t first = tile * cpu::kChannels;
        cpu::propagate(&x.at(0, first), x.stride, &y.at(0, first), y.stride, rows,
                       std::min(cpu::kChannels, channels - first), before.get());
      }
    });
  }
  for (std::thread& each : running) each.join();
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      double sum = x.at(i, c);
      for (int64_t j = 0; j < rows; ++j) sum += std::ldexp(x.at(j, c), -static_cast<int>(std::abs(i - j)));
      // Either sweep stays below 2 and errs by 2^-24 a row, halved from row to row; their sum is below 4.
      check(std::abs(y.at(i, c) - sum) <= (2 + 2 + 2) * 0x1p-24, "a sum over neighbours is off");
    }
  }
}

}  // namespace

void check_neighbors() {
  for (const int64_t rows : {1, 2, 100}) {
    for (const int64_t channels : {1, 31, 32, 33, 200}) {
      for (const int64_t threads : {1, 3}) {
        current = "propagation over " + std::to_string(rows) + " rows of " + std::to_string(channels);
        check_propagation(rows, channels, threads);
      }
    }
  }
}

}  // namespace llava_st::tests
