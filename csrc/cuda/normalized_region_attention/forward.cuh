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
struct RegionOfQuery {
  using T = typename L::Element;
  const NormalizedProblem& problem;
  Site site;
  Places places;
  RegionRows<const T> keys, values;

  LLAVA_ST_DEVICE RegionOfQuery(const NormalizedProblem& problem, int64_t row, const Operand<const T>& key,
                                const Operand<const T>& value)
      : problem(problem),
        site(problem.attention, row),
        places(site.region.size),
        keys(problem.attention, site, key),
        values(problem.attention, site, value) {}

  LLAVA_ST_DEVICE int64_t count() const { return places.count; }
  LLAVA_ST_DEVICE int width() const { return problem.attention.head_dim; }
  LLAVA_ST_DEVICE const T* key(int64_t i) const { return keys.at(places.at<false>(i)); }
  LLAVA_ST_DEVICE const T* value(int64_t i) const { return values.at(places.at<false>(i)); }
  LLAVA_ST_DEVICE const T* row_of(const Operand<const T>& operand) const {
    return site.query_row(problem.attention, operand);
  }

  LLAVA_ST_DEVICE Normalizer normalizer(const T* row) const { return normalizer_of_row<L>(row, width(), problem.eps); }
};

template <class L>
LLAVA_ST_DEVICE void score_chunk(const RegionOfQuery<L>& region, const typename L::Element* query, int64_t begin,
                                 int count, ForwardChunk& chunk) {
  for (int i = thread_index() / kWarpSize; i < count; i += kRowWarps) {
    const auto* const key = region.key(begin + i);
    const float score = normalized_product<L>(key, region.normalizer(key), query, region.width());
    const Normalizer value = region.normalizer(region.value(begin + i));
    if (thread_index() % kWarpSize == 0) {
      chunk.score[i] = score;
      chunk.value[i] = value;
    }
  }
}

template <class L>
LLAVA_ST_DEVICE void attend_normalized(const NormalizedForwardArguments<typename L::Element>& arguments, int64_t row,
                                       ForwardChunk& chunk) {
  const RegionOfQuery<L> region(arguments.problem, row, arguments.key, arguments.value);
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
        result.add(weight * chunk.value[i].inverse, region.value(begin + i), chunk.value[i].mean);
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
  const AttentionProblem& problem = arguments.problem.attention;
  for (int64_t row = block_index(); row < problem.queries * problem.heads; row += block_count()) {
    attend_normalized<L>(arguments, row, chunk[0]);
  }
}

}  // namespace llava_st::cuda
