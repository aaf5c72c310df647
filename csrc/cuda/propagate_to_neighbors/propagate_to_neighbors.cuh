// y = (I + M) x along the rows of a matrix, M_ij = 2^-|i-j|, in linear time: with f_i = x_i + f_(i-1) / 2 and
// b_i = x_i + b_(i+1) / 2, y_i is f_i + b_i. One thread per channel; all f_i go through memory, in float.
#pragma once

#include "../hardware.cuh"

namespace llava_st::cuda {

constexpr int kPropagationThreads = 128;
constexpr int kRowsInFlight = 8;  // loads that do not wait for each other

template <class T>
struct PropagationArguments {
  const T* x;
  T* y;           // contiguous
  float* before;  // likewise: the f_i
  int64_t rows, channels, x_stride;
};

/// The elements of one column from row `first` on, upwards or downwards; zeros past the ends.
template <int STEP, class T>
LLAVA_ST_DEVICE void load_rows(const PropagationArguments<T>& arguments, int64_t channel, int64_t first,
                               float (&values)[kRowsInFlight]) {
  LLAVA_ST_UNROLL
  for (int i = 0; i < kRowsInFlight; ++i) {
    const int64_t row = first + STEP * i;
    const bool exists = row >= 0 && row < arguments.rows;
    values[i] = float_of(load_once(arguments.x + row * arguments.x_stride + channel, exists));
  }
}

template <class T>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kPropagationThreads, 1)
    propagate_to_neighbors(const PropagationArguments<T> arguments) {
  const int64_t channel = block_index() * kPropagationThreads + thread_index();
  if (channel >= arguments.channels) return;
  float values[kRowsInFlight];
  float sum = 0.0f;
  for (int64_t first = 0; first < arguments.rows; first += kRowsInFlight) {
    load_rows<1>(arguments, channel, first, values);
    LLAVA_ST_UNROLL
    for (int i = 0; i < kRowsInFlight; ++i) {
      sum = sum * 0.5f + values[i];
      if (first + i < arguments.rows) store(arguments.before + (first + i) * arguments.channels + channel, sum);
    }
  }
  sum = 0.0f;
  for (int64_t first = arguments.rows - 1; first >= 0; first -= kRowsInFlight) {
    load_rows<-1>(arguments, channel, first, values);
    LLAVA_ST_UNROLL
    for (int i = 0; i < kRowsInFlight; ++i) {
      sum = sum * 0.5f + values[i];
      if (first - i < 0) continue;
      const int64_t at = (first - i) * arguments.channels + channel;
      T rounded;
      round_to(rounded, arguments.before[at] + sum);
      store(arguments.y + at, rounded);
    }
  }
}

}  // namespace llava_st::cuda
