// Each warp has some channels of all rows: how their sums come together, always in the same order.
#pragma once

#include "factors.cuh"

namespace llava_st::cuda {

constexpr int kTile = kTileRows * kTileHeads;
/// What is summed over channels for one product of tokens and heads: a number for each row and head, and one for each
/// head alone.
constexpr int kProductSums = kTile + kTileHeads;

/// Where the product of row `row` and head `head` is, and the sum of the head's own row.
LLAVA_ST_DEVICE int product_at(int row, int head) { return row * kTileHeads + head; }
LLAVA_ST_DEVICE int head_at(int head) { return kTile + head; }

/// Sums over each warp's channels. PRODUCTS: 1 of keys and queries, 2 of values and gradients of the output besides.
template <int PRODUCTS>
struct PartialSums {
  float products[kMostWarps][PRODUCTS][kProductSums];
  Moments rows[kMostWarps][2][kTileRows];  // of keys and values

  template <class T>
  LLAVA_ST_DEVICE void note_product(int which, const TileLane& lane, const Slice<T, AlongGroups> (&rows)[2],
                                    const Slice<T, AlongGroups>& heads) {
    float d[4] = {};
    multiply_slices<T>(rows, heads, d);
    float* const to = products[lane.warp][which];
    LLAVA_ST_UNROLL
    for (int i = 0; i < 4; ++i) to[product_at(lane.group + i / 2 * 8, 2 * lane.pair + i % 2)] = d[i];
    const float sum = heads.sum();
    if (lane.pair == 0) to[head_at(lane.group)] = sum;
  }

  template <class T>
  LLAVA_ST_DEVICE void note_moments(int which, const TileLane& lane, Slice<T, AlongGroups> (&slices)[2]) {
    LLAVA_ST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Moments moments = slices[half].moments(lane);
      if (lane.pair == 0) rows[lane.warp][which][lane.group + 8 * half] = moments;
    }
  }

  template <class T>
  LLAVA_ST_DEVICE void note_moments(int which, const TileLane& lane, Slice<T, AlongPairs> (&slices)[4]) {
    LLAVA_ST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Moments moments = slices[i].moments(lane);
      if (lane.group == 0) rows[lane.warp][which][lane.row_of_pair(i)] = moments;
    }
  }

  /// All threads of the block share the sums out.
  LLAVA_ST_DEVICE void merge_products(float (&to)[PRODUCTS][kProductSums]) const {
    const int warps = block_threads() / kWarpSize;
    for (int i = thread_index(); i < PRODUCTS * kProductSums; i += block_threads()) {
      float sum = 0.0f;
      for (int warp = 0; warp < warps; ++warp) sum += products[warp][i / kProductSums][i % kProductSums];
      to[i / kProductSums][i % kProductSums] = sum;
    }
  }

  /// With the distances of the warps' means from that of all, squares add up exactly (Chan, Golub and LeVeque, 1979).
  LLAVA_ST_DEVICE void merge_moments(Normalizer (&to)[2][kTileRows], int width, float eps) const {
    const int warps = block_threads() / kWarpSize;
    for (int i = thread_index(); i < 2 * kTileRows; i += block_threads()) {
      const int which = i / kTileRows, row = i % kTileRows;
      float sum = 0.0f;
      for (int warp = 0; warp < warps; ++warp) {
        sum += static_cast<float>(slice_channels(warp, width)) * rows[warp][which][row].mean;
      }
      const float mean = sum / static_cast<float>(width);
      float squares = 0.0f;
      for (int warp = 0; warp < warps; ++warp) {
        const Moments part = rows[warp][which][row];
        const float distance = part.mean - mean;
        squares += part.squares + static_cast<float>(slice_channels(warp, width)) * distance * distance;
      }
      to[which][row] = {mean, inverse_deviation(squares / static_cast<float>(width), eps)};
    }
  }
};

/// The inner product of a row that is normalised with a head's row, from sums of the rows as they are.
LLAVA_ST_DEVICE float normalized_product(const float (&sums)[kProductSums], int row, int head, Normalizer normalizer) {
  return normalizer.inverse * (sums[product_at(row, head)] - normalizer.mean * sums[head_at(head)]);
}

/// The softmax of one head's scores for the keys 2p, 2p+1, 2p+8, 2p+9 of each lane; zero where there is no key, for
/// which the score is minus infinity.
LLAVA_ST_DEVICE void softmax_over_pairs(const float (&scores)[4], float (&weights)[4]) {
  LargestScore largest;
  LLAVA_ST_UNROLL
  for (int i = 0; i < 4; ++i) largest.largest = maximum(largest.largest, scores[i]);
  largest.largest = maximum(largest.largest, shuffle_xor(largest.largest, 1));
  largest.largest = maximum(largest.largest, shuffle_xor(largest.largest, 2));
  float sum = 0.0f;
  LLAVA_ST_UNROLL
  for (int i = 0; i < 4; ++i) {
    weights[i] = weight_of(scores[i], largest.base());
    sum += weights[i];
  }
  const float normalization = 1.0f / AlongGroups::sum_over_row(sum);
  LLAVA_ST_UNROLL
  for (int i = 0; i < 4; ++i) weights[i] *= normalization;
}

}  // namespace llava_st::cuda
