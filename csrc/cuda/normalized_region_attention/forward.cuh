// Normalized region attention, forward, for any dtype, width and number of keys. A block takes a region and a head: its
// warps score a chunk of keys, then its threads sum up the values of the chunk, each some channels.
#pragma once

#include "rows.cuh"

namespace llava_st::cuda {

/// A chunk of keys and values, scored.
struct ForwardChunk {
  float score[kChunkRows];
  Normalizer value[kChunkRows];
};

template <class L>
struct RegionOfHead {
  using T = typename L::Element;
  const NormalizedProblem& problem;
  int64_t query, head;
  QueryRegion region;
  TokenRows<const T, false> keys, values;

  LLAVA_ST_DEVICE RegionOfHead(const NormalizedProblem& problem, int64_t row, const Operand<const T>& key,
                               const Operand<const T>& value)
      : problem(problem),
        query(problem.by_heads.quotient(row)),
        head(row - query * problem.heads),
        region(problem, query),
        keys(region, key),
        values(region, value) {}

  LLAVA_ST_DEVICE int64_t count() const { return keys.count(); }
  LLAVA_ST_DEVICE int width() const { return problem.width; }
  LLAVA_ST_DEVICE const T* row_of(const Operand<const T>& operand) const { return region.query_row(operand, head); }
  LLAVA_ST_DEVICE Normalizer normalizer(const T* row) const { return normalizer_of_row<L>(row, width(), problem.eps); }
};

template <class L>
LLAVA_ST_DEVICE void score_chunk(const RegionOfHead<L>& region, const typename L::Element* query, int64_t begin,
                                 int count, ForwardChunk& chunk) {
  for (int i = thread_index() / kWarpSize; i < count; i += kRowWarps) {
    const auto* const key = region.keys.at(begin + i);
    const float score = normalized_product<L>(key, region.normalizer(key), query, region.width());
    const Normalizer value = region.normalizer(region.values.at(begin + i));
    if (thread_index() % kWarpSize == 0) {
      chunk.score[i] = score;
      chunk.value[i] = value;
    }
  }
}

template <class L>
LLAVA_ST_DEVICE void attend_normalized(const NormalizedForwardArguments<typename L::Element>& arguments, int64_t row,
                                       ForwardChunk& chunk) {
  const RegionOfHead<L> region(arguments.problem, row, arguments.key, arguments.value);
  const auto* const query = region.row_of(arguments.query);
  auto* const output = arguments.output + row * region.width();
  for (int at = 0; at < region.width(); at += kSumChannels<L>) {
    RowSums<L> result(at, region.width());
    LargestScore largest;
    float weights = 0.0f;  // their sum
    for (int64_t begin = 0; begin < region.count(); begin += kChunkRows) {
      const int count = static_cast<int>(smaller(kChunkRows, region.count() - begin));
      block_barrier();  // the chunk before is no longer needed
      score_chunk<L>(region, query, begin, count, chunk);
      block_barrier();
      const float correction = largest.include(chunk.score, count);
      weights *= correction;
      result.scale(correction);
      for (int i = 0; i < count; ++i) {
        const float weight = weight_of(chunk.score[i], largest.base());
        weights += weight;
        result.add(weight * chunk.value[i].inverse, region.values.at(begin + i), chunk.value[i].mean);
      }
    }
    result.scale(1.0f / weights);
    result.store(output);
  }
}

template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kRowThreads, 1)
    normalized_forward(const NormalizedForwardArguments<typename L::Element> arguments) {
  LLAVA_ST_SHARED(ForwardChunk, chunk, 1);
  const NormalizedProblem& problem = arguments.problem;
  for (int64_t row = block_index(); row < problem.queries * problem.heads; row += block_count()) {
    attend_normalized<L>(arguments, row, chunk[0]);
  }
}

}  // namespace llava_st::cuda
