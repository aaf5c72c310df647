// Normalized region attention, forward, on the tensor cores: a block takes a region of at most sixteen keys, its warps
// share the channels out, and heads go through eight at a time. Keys, values and queries are read once: values stay in
// registers while the weights come about.
//
// Keys are multiplied as they are, for (x - mean) rounded to 16 bits would lose what bfloat16 has of large means:
//   score = (key . query - mean(key) * sum(query)) / deviation(key), in float,
// and so are values: with factors w = weight / deviation(value), sum of w value - sum of w mean(value).
#pragma once

#include "merging.cuh"

namespace llava_st::cuda {

struct ForwardTile {
  PartialSums<1> partial;
  float products[1][kProductSums];
  Normalizer normalizers[2][kTileRows];  // of keys and values
};

template <class T>
using TileTokens = TokenRows<T, true>;

template <class T>
LLAVA_ST_DEVICE HeadFactors<T> forward_factors(const ForwardTile& tile, const TileLane& lane, int keys) {
  float scores[4], factors[4], means[4];
  LLAVA_ST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int row = lane.row_of_pair(i);
    const float score = normalized_product(tile.products[0], row, lane.group, tile.normalizers[0][row]);
    scores[i] = row < keys ? score : -INFINITY;
  }
  softmax_over_pairs(scores, factors);
  LLAVA_ST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int row = lane.row_of_pair(i);
    const Normalizer value = tile.normalizers[1][row];
    factors[i] = row < keys ? factors[i] * value.inverse : 0.0f;
    means[i] = value.mean;
  }
  return HeadFactors<T>(factors, means);
}

template <class T>
LLAVA_ST_DEVICE void attend_tile(const NormalizedForwardArguments<T>& arguments, const TileLane& lane, int64_t query,
                                 ForwardTile& tile) {
  const NormalizedProblem& problem = arguments.problem;
  const QueryRegion region(problem, query);
  const TileTokens<const T> keys(region, arguments.key), values(region, arguments.value);
  Slice<T, AlongPairs> value[4];
  LLAVA_ST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int row = lane.row_of_pair(i);
    value[i].load_once(values.at(row), lane, values.has(row));
  }

  for (int64_t first = 0; first < problem.heads; first += kTileHeads) {
    const int64_t head = first + lane.group;
    const bool exists = head < problem.heads;
    Slice<T, AlongGroups> key[2], rows;  // more than eight heads read keys anew: all of them would not fit registers
    LLAVA_ST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = lane.group + 8 * half;
      key[half].load_once(keys.at(row), lane, keys.has(row));
    }
    rows.load_once(region.query_row(arguments.query, head), lane, exists);
    if (first == 0) {
      tile.partial.note_moments(0, lane, key);
      tile.partial.note_moments(1, lane, value);
    }
    tile.partial.note_product(0, lane, key, rows);
    block_barrier();
    tile.partial.merge_products(tile.products);
    if (first == 0) tile.partial.merge_moments(tile.normalizers, lane.width, problem.eps);
    block_barrier();

    const HeadFactors<T> factors = forward_factors<T>(tile, lane, static_cast<int>(keys.count()));
    T* const output = arguments.output + (query * problem.heads + head) * problem.width;
    LLAVA_ST_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      StepSums sums;
      sums.add<T>(factors.fragment, value[0].packet[step], value[1].packet[step], value[2].packet[step],
                  value[3].packet[step]);
      if (exists) factors.store_sums(sums, output, lane, step);
    }
  }
}

template <class T>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kMostTileThreads, 1)
    normalized_tile_forward(const NormalizedForwardArguments<T> arguments) {
  LLAVA_ST_SHARED(ForwardTile, tile, 1);
  const NormalizedProblem& problem = arguments.problem;
  const TileLane lane(problem.width);
  for (int64_t query = block_index(); query < problem.queries; query += block_count()) {
    attend_tile(arguments, lane, query, tile[0]);
  }
}

}  // namespace llava_st::cuda
