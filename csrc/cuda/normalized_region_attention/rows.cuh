// Rows of any width as the warps of the general kernels take them: normalised on the way, and multiplied.
#pragma once

#include "../row_packets.cuh"
#include "regions.cuh"

namespace llava_st::cuda {

constexpr float kLog2OfE = 1.44269504088896340736f;
constexpr int kRowWarps = 4;
constexpr int kRowThreads = kRowWarps * kWarpSize;
/// How many rows a block scores before it goes on: what shared memory has room for, whatever a region has.
constexpr int kChunkRows = 32;
/// A block sums over rows in as many packets per thread; wider rows take another round.
constexpr int kSumPackets = 2;

template <class L>
constexpr int kSumChannels = kRowThreads * kSumPackets * L::ELEMENTS;

LLAVA_ST_DEVICE float sum_over_warp(float x) {
  LLAVA_ST_UNROLL
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

template <class L>
LLAVA_ST_DEVICE Channels<L> load_channels(const typename L::Element* from) {
  return Channels<L>(load_often(reinterpret_cast<const typename L::Packet*>(from)));
}

template <class L>
LLAVA_ST_DEVICE void store_channels(typename L::Element* to, const Channels<L>& channels) {
  store(reinterpret_cast<typename L::Packet*>(to), channels.packed());
}

/// The sum over a row of what `visit` makes of each of its packets.
template <class L, class Visit>
LLAVA_ST_DEVICE float sum_over_row(int width, const Visit& visit) {
  float sum = 0.0f;
  for (int at = thread_index() % kWarpSize * L::ELEMENTS; at < width; at += kWarpSize * L::ELEMENTS) sum += visit(at);
  return sum_over_warp(sum);
}

template <class L>
LLAVA_ST_DEVICE float mean_of_row(const typename L::Element* row, int width) {
  const float sum = sum_over_row<L>(width, [&](int at) {
    const Channels<L> x = load_channels<L>(row + at);
    float part = 0.0f;
    LLAVA_ST_UNROLL
    for (int i = 0; i < L::ELEMENTS; ++i) part += x.of[i];
    return part;
  });
  return sum / static_cast<float>(width);
}

/// What a row is normalised with.
struct Normalizer {
  float mean, inverse;
};

/// What a row of that variance is multiplied with. Without any, and with eps = 0, a row becomes NaN, and so does all
/// that depends on it; infinity would not get everywhere.
LLAVA_ST_DEVICE float inverse_deviation(float variance, float eps) {
  const float inverse = 1.0f / square_root(variance + eps);
  return inverse == INFINITY ? NAN : inverse;
}

template <class L>
LLAVA_ST_DEVICE Normalizer normalizer_of_row(const typename L::Element* row, int width, float eps) {
  const float mean = mean_of_row<L>(row, width);
  const float squares = sum_over_row<L>(width, [&](int at) {
    const Channels<L> x = load_channels<L>(row + at);
    float part = 0.0f;
    LLAVA_ST_UNROLL
    for (int i = 0; i < L::ELEMENTS; ++i) part += (x.of[i] - mean) * (x.of[i] - mean);
    return part;
  });
  return {mean, inverse_deviation(squares / static_cast<float>(width), eps)};
}

/// The inner product of a row with another one that is normalised.
template <class L>
LLAVA_ST_DEVICE float normalized_product(const typename L::Element* normalized, Normalizer normalizer,
                                         const typename L::Element* row, int width) {
  const float sum = sum_over_row<L>(width, [&](int at) {
    const Channels<L> x = load_channels<L>(normalized + at), y = load_channels<L>(row + at);
    float part = 0.0f;
    LLAVA_ST_UNROLL
    for (int i = 0; i < L::ELEMENTS; ++i) part += (x.of[i] - normalizer.mean) * y.of[i];
    return part;
  });
  return sum * normalizer.inverse;
}

/// A thread's part of sums over rows: packets that lie a block apart.
template <class L>
struct RowSums {
  int begin, width;
  Channels<L> sum[kSumPackets];

  LLAVA_ST_DEVICE RowSums(int begin, int width) : begin(begin + thread_index() * L::ELEMENTS), width(width) {}

  LLAVA_ST_DEVICE int at(int packet) const { return begin + packet * kRowThreads * L::ELEMENTS; }

  LLAVA_ST_DEVICE void scale(float factor) {
    LLAVA_ST_UNROLL
    for (int packet = 0; packet < kSumPackets; ++packet) sum[packet].scale(factor);
  }

  /// Adds a row, less its mean.
  LLAVA_ST_DEVICE void add(float factor, const typename L::Element* row, float mean) {
    LLAVA_ST_UNROLL
    for (int packet = 0; packet < kSumPackets; ++packet) {
      if (at(packet) >= width) continue;
      const Channels<L> x = load_channels<L>(row + at(packet));
      LLAVA_ST_UNROLL
      for (int i = 0; i < L::ELEMENTS; ++i) sum[packet].of[i] += factor * (x.of[i] - mean);
    }
  }

  LLAVA_ST_DEVICE void store(typename L::Element* row) const {
    LLAVA_ST_UNROLL
    for (int packet = 0; packet < kSumPackets; ++packet) {
      if (at(packet) < width) store_channels<L>(row + at(packet), sum[packet]);
    }
  }
};

/// The running maximum of scores.
struct LargestScore {
  float largest = -INFINITY;

  /// Zero, not minus infinity, as long as there is no score: weights are then 0 instead of NaN.
  LLAVA_ST_DEVICE float base() const { return largest == -INFINITY ? 0.0f : largest; }

  /// Takes in some more; returns the factor that corrects sums of weights so far. NaN is passed over here, and comes
  /// back in the weights.
  LLAVA_ST_DEVICE float include(const float* scores, int count) {
    const float before = largest;
    for (int i = 0; i < count; ++i) largest = maximum(largest, scores[i]);
    return exp2(kLog2OfE * (before - base()));
  }
};

/// exp(score - base).
LLAVA_ST_DEVICE float weight_of(float score, float base) { return exp2(kLog2OfE * (score - base)); }

}  // namespace llava_st::cuda
