// Normalized region attention, backward, on the tensor cores: a block takes a region of at most sixteen keys, its warps
// share the channels out. All gradients of a region are the block's own, and all their factors are known as soon as
// the scores are: keys and values come from memory once, and those rows that are wanted in two orders come from the L1
// cache the second time.
#pragma once

#include "tile_coefficients.cuh"
#include "tile_forward.cuh"

namespace llava_st::cuda {

/// Where the rows of a region's heads are, of the query or of the gradient of the output.
template <class T>
struct HeadRows {
  const T* first;
  int64_t stride, count;

  LLAVA_ST_DEVICE HeadRows(const NormalizedProblem& problem, const QueryRegion& region, const Operand<const T>& operand)
      : first(settled(region.query_row(operand, 0))), stride(operand.strides.head), count(problem.heads) {}

  LLAVA_ST_DEVICE void load(Slice<T, AlongGroups>& slice, int head, const TileLane& lane) const {
    slice.load_often(first + head * stride, lane, head < count);
  }

  /// One packet of a lane that lies along pairs.
  LLAVA_ST_DEVICE Words packet(int head, const TileLane& lane, int step) const {
    return load_packet<T, AlongPairs>(first + head * stride, lane, step, head < count);
  }
};

/// Writes the gradients of the rows g and g + 8 in a step: of sums over heads what neither the mean of a row nor its
/// deviation had a part in.
template <class T>
LLAVA_ST_DEVICE void store_token_gradients(const StepSums& sums, const TileTokens<const T>& rows,
                                           const BackwardTile& tile, int which, const TileTokens<T>& gradients,
                                           const TileLane& lane, int step) {
  LLAVA_ST_UNROLL
  for (int lower = 0; lower < 2; ++lower) {
    const int row = lane.group + 8 * lower;
    if (!gradients.has(row)) continue;
    const TokenFactors token = tile.tokens[which][row];
    const Normalizer normalizer = tile.normalizers[which][row];
    T* const to = gradients.at(row);
    LLAVA_ST_UNROLL
    for (int half = 0; half < 2; ++half) {
      float x[kPacket];
      unpack<T>(load_packet<T, AlongGroups>(rows.at(row), lane, 2 * step + half, true), x);
      LLAVA_ST_UNROLL
      for (int c = 0; c < kPacket; ++c) {
        const float sum = (sums.d[c][2 * lower + half] - token.shift) * token.unit;
        x[c] = normalizer.inverse * (sum - (x[c] - normalizer.mean) * normalizer.inverse * token.along);
      }
      const int channel = AlongGroups::channel(lane, 2 * step + half);
      Words packet;
      pack<T>(x, packet);
      if (channel < lane.width) store_streaming(reinterpret_cast<Words*>(to + channel), packet);
    }
  }
}

/// The gradients of keys (`which` = 0) or values (1): sums over heads of the rows of `heads`.
///
/// Where things are is found out anew: kept from the beginning, it would take registers that rows need.
template <class T>
LLAVA_ST_DEVICE void differentiate_tokens(const NormalizedProblem& problem, int64_t query,
                                          const Operand<const T>& heads, const Operand<const T>& tokens,
                                          const BackwardTile& tile, int which, int groups, const Operand<T>& gradient,
                                          const TileLane& lane) {
  const QueryRegion region(problem, afresh(query));
  const TileTokens<const T> rows(region, tokens);
  const TileTokens<T> gradients(region, gradient);
  const HeadRows<T> head_rows(problem, region, heads);
  for (int step = 0; step < kSteps; ++step) {
    StepSums sums;
    for (int group = 0; group < groups; ++group) {
      const Words words = tile.token_fragments[group][which][thread_index() % kWarpSize];
      const uint32_t fragment[4] = {words.word[0], words.word[1], words.word[2], words.word[3]};
      const int head = group * kTileHeads + 2 * lane.pair;
      const Words x0 = head_rows.packet(head, lane, step);
      const Words x1 = head_rows.packet(head + 1, lane, step);
      sums.add<T>(fragment, x0, x1, x0, x1);
    }
    store_token_gradients<T>(sums, rows, tile, which, gradients, lane, step);
  }
}

/// The gradients of queries: sums over keys.
template <class T>
LLAVA_ST_DEVICE void differentiate_queries(const NormalizedProblem& problem, int64_t query, const Operand<const T>& key,
                                           const BackwardTile& tile, int groups, T* gradients, const TileLane& lane) {
  const QueryRegion region(problem, afresh(query));
  const TileTokens<const T> keys(region, key);
  for (int step = 0; step < kSteps; ++step) {
    Words x[4];
    LLAVA_ST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = lane.row_of_pair(i);
      x[i] = load_packet<T, AlongPairs>(keys.at(row), lane, step, keys.has(row));
    }
    for (int group = 0; group < groups; ++group) {
      const int64_t head = group * kTileHeads + lane.group;
      const Words words = tile.query_fragments[group][thread_index() % kWarpSize];
      HeadFactors<T> factors;
      LLAVA_ST_UNROLL
      for (int i = 0; i < 4; ++i) factors.fragment[i] = words.word[i];
      factors.unit = tile.query_units[group][lane.group];
      factors.shift = tile.query_shifts[group][lane.group];
      StepSums sums;
      sums.add<T>(factors.fragment, x[0], x[1], x[2], x[3]);
      T* const row = gradients + (query * problem.heads + head) * problem.width;
      if (head < problem.heads) factors.store_sums(sums, row, lane, step);
    }
  }
}

template <class T>
LLAVA_ST_DEVICE void load_rows(Slice<T, AlongGroups> (&slices)[2], const TileTokens<const T>& rows,
                               const TileLane& lane) {
  LLAVA_ST_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = lane.group + 8 * half;
    slices[half].load_often(rows.at(row), lane, rows.has(row));
  }
}

/// Leaves scores and gradients of weights of all heads as sums over channels, and what tokens are normalised with.
/// Returns how many keys the region has.
template <class T>
LLAVA_ST_DEVICE int sum_over_channels(const NormalizedBackwardArguments<T>& arguments, const TileLane& lane,
                                      int64_t query, int groups, BackwardTile& tile) {
  const NormalizedProblem& problem = arguments.problem;
  const QueryRegion region(problem, query);
  const TileTokens<const T> keys(region, arguments.key), values(region, arguments.value);
  const HeadRows<T> query_rows(problem, region, arguments.query), grad_rows(problem, region, arguments.grad_output);
  for (int group = 0; group < groups; ++group) {
    const int head = group * kTileHeads + lane.group;
    Slice<T, AlongGroups> key[2], value[2], queries, grads;
    load_rows(key, keys, lane);
    load_rows(value, values, lane);
    query_rows.load(queries, head, lane);
    if (group == 0) tile.partial.note_moments(0, lane, key);
    tile.partial.note_product(0, lane, key, queries);
    grad_rows.load(grads, head, lane);
    if (group == 0) tile.partial.note_moments(1, lane, value);
    tile.partial.note_product(1, lane, value, grads);
    block_barrier();
    tile.partial.merge_products(tile.products[group]);
    if (group == 0) tile.partial.merge_moments(tile.normalizers, lane.width, problem.eps);
    block_barrier();
  }
  return static_cast<int>(keys.count());
}

template <class T>
LLAVA_ST_DEVICE void differentiate_tile(const NormalizedBackwardArguments<T>& arguments, const TileLane& lane,
                                        int64_t query, BackwardTile& tile) {
  const NormalizedProblem& problem = arguments.problem;
  const int groups = static_cast<int>(ceil_div(problem.heads, kTileHeads));
  const int keys = sum_over_channels(arguments, lane, query, groups, tile);
  if (lane.warp == 0) {
    for (int group = 0; group < groups; ++group) {
      find_query_factors<T>(tile, lane, group, keys, group * kTileHeads + lane.group < problem.heads);
    }
    warp_barrier();
    for (int which = 0; which < 2; ++which) find_token_factors<T>(tile, lane, which, groups);
  }
  block_barrier();
  differentiate_tokens<T>(problem, query, arguments.query, arguments.key, tile, 0, groups, arguments.grad_key, lane);
  differentiate_tokens<T>(problem, query, arguments.grad_output, arguments.value, tile, 1, groups, arguments.grad_value,
                          lane);
  differentiate_queries<T>(problem, query, arguments.key, tile, groups, arguments.grad_query, lane);
}

template <class T>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kMostTileThreads, 1)
    normalized_tile_backward(const NormalizedBackwardArguments<T> arguments) {
  LLAVA_ST_SHARED(BackwardTile, tile, 1);
  const NormalizedProblem& problem = arguments.problem;
  const TileLane lane(problem.width);
  for (int64_t query = block_index(); query < problem.queries; query += block_count()) {
    differentiate_tile(arguments, lane, query, tile[0]);
  }
}

}  // namespace llava_st::cuda
