// Factors of rows in 16 bits without the loss: rounded to T, and what the rounding took away as another number of T.
#pragma once

#include "slices.cuh"

namespace llava_st::cuda {

struct OneWord {
  uint32_t word[1];
};

/// Two neighbouring factors. `rest` is multiplied with `magnify`, a power of two, lest it fall below what T can hold.
template <class T>
struct SplitPair {
  uint32_t rounded, rest;
  float kept[2];  // what the two parts come to together

  LLAVA_ST_DEVICE SplitPair(float first, float second, float magnify) {
    const float factors[2] = {first, second};
    OneWord word;
    float parts[2], rests[2];
    pack_words<T>(factors, word);
    rounded = word.word[0];
    unpack_words<T>(word, parts);
    LLAVA_ST_UNROLL
    for (int i = 0; i < 2; ++i) rests[i] = (factors[i] - parts[i]) * magnify;
    pack_words<T>(rests, word);
    rest = word.word[0];
    unpack_words<T>(word, rests);
    LLAVA_ST_UNROLL
    for (int i = 0; i < 2; ++i) kept[i] = parts[i] + rests[i] / magnify;
  }
};

/// A divisor that brings factors of at most `largest` to at most one: what float16 has range for.
LLAVA_ST_DEVICE float unit_of(float largest) { return largest > 0.0f ? largest : 1.0f; }

/// The sums over keys of one head in a lane: factors for the keys 2p, 2p+1, 2p+8, 2p+9, and what to make of the sum.
///
/// Of the matrix product's sixteen rows the first eight are heads, and the others are the rests of the same heads.
template <class T>
struct HeadFactors {
  static constexpr float kMagnify = 2048.0f;

  uint32_t fragment[4];
  float unit;   // of the factors
  float shift;  // what the means of the rows add to the sum

  HeadFactors() = default;

  LLAVA_ST_DEVICE HeadFactors(const float (&factors)[4], const float (&means)[4]) {
    float largest = 0.0f;
    LLAVA_ST_UNROLL
    for (int i = 0; i < 4; ++i) largest = maximum(largest, maximum(factors[i], -factors[i]));
    largest = maximum(largest, shuffle_xor(largest, 1));
    unit = unit_of(maximum(largest, shuffle_xor(largest, 2)));
    shift = 0.0f;
    LLAVA_ST_UNROLL
    for (int i = 0; i < 4; i += 2) {
      const SplitPair<T> pair(factors[i] / unit, factors[i + 1] / unit, kMagnify);
      fragment[i] = pair.rounded;
      fragment[i + 1] = pair.rest;
      shift += pair.kept[0] * means[i] + pair.kept[1] * means[i + 1];
    }
    shift = AlongGroups::sum_over_row(shift);
  }

  /// Writes the lane's sixteen channels of a step.
  LLAVA_ST_DEVICE void store_sums(const StepSums& sums, T* row, const TileLane& lane, int step) const {
    LLAVA_ST_UNROLL
    for (int half = 0; half < 2; ++half) {
      float x[kPacket];
      LLAVA_ST_UNROLL
      for (int c = 0; c < kPacket; ++c) {
        x[c] = (sums.d[c][half] + sums.d[c][half + 2] * (1.0f / kMagnify) - shift) * unit;
      }
      const int channel = AlongGroups::channel(lane, 2 * step + half);
      Words packet;
      pack<T>(x, packet);
      if (channel < lane.width) store(reinterpret_cast<Words*>(row + channel), packet);
    }
  }
};

}  // namespace llava_st::cuda
