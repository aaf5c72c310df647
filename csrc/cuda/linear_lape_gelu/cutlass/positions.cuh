// What a fused product adds to its rows: the bias and, by the row's place in its grid, one row of each table.
#pragma once

#include "../../divisor.cuh"
#include "../../elements.cuh"

namespace llava_st::cuda {

/// Where the rows lie that belong to one row of a product.
struct PositionRows {
  const float *bias, *temporal, *height, *width;

  /// COUNT channels' positions: two or four, as one load has them, or eight. In the order of position_gelu.
  template <int COUNT>
  LLAVA_ST_DEVICE void add_to(float* x, int64_t channel) const {
    constexpr int STEP = COUNT < 4 ? COUNT : 4;
    LLAVA_ST_UNROLL
    for (int i = 0; i < COUNT; i += STEP) {
      float b[STEP], t[STEP], h[STEP], w[STEP];
      load<STEP>(bias + channel + i, b);
      load<STEP>(temporal + channel + i, t);
      load<STEP>(height + channel + i, h);
      load<STEP>(width + channel + i, w);
      LLAVA_ST_UNROLL
      for (int j = 0; j < STEP; ++j) x[i + j] += w[j] + (b[j] + t[j] + h[j]);
    }
  }

 private:
  template <int COUNT>
  static LLAVA_ST_DEVICE void load(const float* from, float* to) {
    unpack<float>(load_often(reinterpret_cast<const Packet<float, COUNT>*>(from)), to);
  }
};

/// Bias and tables, contiguous and aligned, and the grid whose places are the rows of a product.
struct Positions {
  const float *bias, *temporal, *height, *width;
  int64_t channels;
  Divisor by_columns, by_rows, by_frames;

  LLAVA_ST_DEVICE PositionRows at(int place) const {
    const int line = by_columns.small_quotient(place), frame = by_rows.small_quotient(line);
    const int64_t x = place - line * by_columns.divisor, y = line - frame * by_rows.divisor;
    const int64_t t = frame - by_frames.small_quotient(frame) * by_frames.divisor;
    return {bias, temporal + t * channels, height + y * channels, width + x * channels};
  }
};

}  // namespace llava_st::cuda
