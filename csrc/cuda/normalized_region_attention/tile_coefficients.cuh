// From the sums of a region's products to the factors of its gradients: what one warp of the backward kernel works out
// for the others. See backward.cuh for the formulas.
#pragma once

#include "merging.cuh"

namespace llava_st::cuda {

constexpr int kMostGroups = 4;  // of eight heads: what shared memory has room for
constexpr int kMostTileHeads = kMostGroups * kTileHeads;

/// How the gradient of a token follows from a sum over heads.
struct TokenFactors {
  float unit;   // of the sum
  float shift;  // what the means of the heads' rows add to it
  float along;  // how much of it lies along the normalised row, per channel
};

struct BackwardTile {
  PartialSums<2> partial;
  Normalizer normalizers[2][kTileRows];  // of keys and values
  float products[kMostGroups][2][kProductSums];
  // The same as scores and gradients of weights, in their places; with gradients of scores and weights as factors.
  float dots[kMostGroups][2][kTile];
  float factors[kMostGroups][2][kTile];
  // Factors as the lanes of matrix products hold them.
  Words query_fragments[kMostGroups][kWarpSize];
  float query_units[kMostGroups][kTileHeads], query_shifts[kMostGroups][kTileHeads];
  Words token_fragments[kMostGroups][2][kWarpSize];
  TokenFactors tokens[2][kTileRows];
};

/// For a group of heads, one per group of lanes: the softmax and its gradient, and the sums over keys that make the
/// gradients of queries.
template <class T>
LLAVA_ST_DEVICE void find_query_factors(BackwardTile& tile, const TileLane& lane, int group, int keys, bool exists) {
  float scores[4], weights[4], grad_weights[4], factors[4], means[4];
  LLAVA_ST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int row = lane.row_of_pair(i);
    const auto& products = tile.products[group];
    const float score = normalized_product(products[0], row, lane.group, tile.normalizers[0][row]);
    const float grad_weight = normalized_product(products[1], row, lane.group, tile.normalizers[1][row]);
    scores[i] = row < keys ? score : -INFINITY;
    grad_weights[i] = row < keys ? grad_weight : 0.0f;
  }
  softmax_over_pairs(scores, weights);
  float delta = 0.0f;
  LLAVA_ST_UNROLL
  for (int i = 0; i < 4; ++i) delta += weights[i] * grad_weights[i];
  delta = AlongGroups::sum_over_row(delta);
  LLAVA_ST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int row = lane.row_of_pair(i), at = product_at(row, lane.group);
    const bool counts = exists && row < keys;
    const float grad_score = weights[i] * (grad_weights[i] - delta);
    tile.dots[group][0][at] = counts ? scores[i] : 0.0f;
    tile.dots[group][1][at] = counts ? grad_weights[i] : 0.0f;
    tile.factors[group][0][at] = counts ? grad_score : 0.0f;
    tile.factors[group][1][at] = counts ? weights[i] : 0.0f;
    factors[i] = counts ? grad_score * tile.normalizers[0][row].inverse : 0.0f;
    means[i] = tile.normalizers[0][row].mean;
  }
  const HeadFactors<T> head(factors, means);
  tile.query_fragments[group][lane.group * 4 + lane.pair] = {
      {head.fragment[0], head.fragment[1], head.fragment[2], head.fragment[3]}};
  if (lane.pair == 0) {
    tile.query_units[group][lane.group] = head.unit;
    tile.query_shifts[group][lane.group] = head.shift;
  }
}

/// The largest of a number over the lanes of a group.
LLAVA_ST_DEVICE float maximum_over_pairs(float x) {
  x = maximum(x, shuffle_xor(x, 1));
  return maximum(x, shuffle_xor(x, 2));
}

/// The sums over heads that make the gradients of keys (`which` = 0) or values (1), for the rows g and g + 8. Of the
/// matrix product's sixteen columns of factors the first eight are heads, and the others are the rests of the same
/// heads.
template <class T>
LLAVA_ST_DEVICE void find_token_factors(BackwardTile& tile, const TileLane& lane, int which, int groups) {
  LLAVA_ST_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = lane.group + 8 * half;
    const int at = product_at(row, 2 * lane.pair);
    float largest = 0.0f;
    for (int group = 0; group < groups; ++group) {
      const float* const factor = tile.factors[group][which] + at;
      LLAVA_ST_UNROLL
      for (int i = 0; i < 2; ++i) largest = maximum(largest, maximum(factor[i], -factor[i]));
    }
    TokenFactors token = {unit_of(maximum_over_pairs(largest)), 0.0f, 0.0f};
    for (int group = 0; group < groups; ++group) {
      const float* const factor = tile.factors[group][which] + at;
      const float* const dot = tile.dots[group][which] + at;
      const float* const sums = tile.products[group][which] + head_at(2 * lane.pair);
      const SplitPair<T> pair(factor[0] / token.unit, factor[1] / token.unit, 1.0f);
      tile.token_fragments[group][which][lane.group * 4 + lane.pair].word[half] = pair.rounded;
      tile.token_fragments[group][which][lane.group * 4 + lane.pair].word[half + 2] = pair.rest;
      token.shift += pair.kept[0] * sums[0] + pair.kept[1] * sums[1];
      token.along += factor[0] * dot[0] + factor[1] * dot[1];
    }
    token.shift = AlongGroups::sum_over_row(token.shift) / static_cast<float>(lane.width);
    token.along = AlongGroups::sum_over_row(token.along) / static_cast<float>(lane.width);
    if (lane.pair == 0) tile.tokens[which][row] = token;
  }
}

}  // namespace llava_st::cuda
