// Normalized region attention, backward, for any dtype, width and number of keys and heads. First a block per region
// and head calculates the gradient of its query and what the softmax divides by; then a block per token sums over the
// heads, so that every gradient has one writer.
//
// With n for the normalised rows, weights p, their gradients g_j = grad_output . n(value_j), gradients of scores
// d_j = p_j (g_j - delta), delta = sum of p g, and the mean of a row's channels written <row>:
//   grad_query = sum over keys of d n(key),
//   grad_key = (sum over heads of d (query - <query>) - n(key) / E * sum over heads of d score) / deviation,
//   grad_value = (sum over heads of p (grad_output - <grad_output>) - n(value) / E * sum over heads of p g) /
//   deviation.
#pragma once

#include "forward.cuh"

namespace llava_st::cuda {

/// A chunk of keys and values for one head, scored.
struct BackwardChunk {
  float score[kChunkRows], grad_weight[kChunkRows];
  Normalizer key[kChunkRows];
};

template <class L>
LLAVA_ST_DEVICE void score_chunk(const RegionOfHead<L>& region, const typename L::Element* query,
                                 const typename L::Element* grad_output, int64_t begin, int count,
                                 BackwardChunk& chunk) {
  for (int i = thread_index() / kWarpSize; i < count; i += kRowWarps) {
    const auto* const key = region.keys.at(begin + i);
    const auto* const value = region.values.at(begin + i);
    const Normalizer of_key = region.normalizer(key);
    const float score = normalized_product<L>(key, of_key, query, region.width());
    const float grad_weight = normalized_product<L>(value, region.normalizer(value), grad_output, region.width());
    if (thread_index() % kWarpSize == 0) {
      chunk.score[i] = score;
      chunk.grad_weight[i] = grad_weight;
      chunk.key[i] = of_key;
    }
  }
}

template <class L>
LLAVA_ST_DEVICE void differentiate_query(const NormalizedBackwardArguments<typename L::Element>& arguments, int64_t row,
                                         BackwardChunk& chunk) {
  const RegionOfHead<L> region(arguments.problem, row, arguments.key, arguments.value);
  const auto* const query = region.row_of(arguments.query);
  const auto* const grad_output = region.row_of(arguments.grad_output);
  const auto score = [&](int64_t begin) {
    const int count = static_cast<int>(smaller(kChunkRows, region.count() - begin));
    block_barrier();  // the chunk before is no longer needed
    score_chunk<L>(region, query, grad_output, begin, count, chunk);
    block_barrier();
    return count;
  };

  LargestScore largest;
  float weights = 0.0f, delta = 0.0f;
  for (int64_t begin = 0; begin < region.count(); begin += kChunkRows) {
    const int count = score(begin);
    const float correction = largest.include(chunk.score, count);
    weights *= correction;
    delta *= correction;
    for (int i = 0; i < count; ++i) {
      const float weight = weight_of(chunk.score[i], largest.base());
      weights += weight;
      delta += weight * chunk.grad_weight[i];
    }
  }
  QueryStatistics statistics = {largest.base(), 1.0f / weights, delta / weights, 0.0f, 0.0f};
  statistics.mean_query = mean_of_row<L>(query, region.width());
  statistics.mean_grad = mean_of_row<L>(grad_output, region.width());
  if (thread_index() == 0) arguments.statistics[row] = statistics;

  for (int at = 0; at < region.width(); at += kSumChannels<L>) {
    RowSums<L> result(at, region.width());
    for (int64_t begin = 0; begin < region.count(); begin += kChunkRows) {
      const bool scored = region.count() <= kChunkRows;
      const int count = scored ? static_cast<int>(region.count()) : score(begin);
      for (int i = 0; i < count; ++i) {
        const float weight = weight_of(chunk.score[i], statistics.base) * statistics.normalization;
        const float grad_score = weight * (chunk.grad_weight[i] - statistics.delta);
        result.add(grad_score * chunk.key[i].inverse, region.keys.at(begin + i), chunk.key[i].mean);
      }
    }
    result.store(arguments.grad_query + row * region.width());
  }
}

template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kRowThreads, 1)
    normalized_query_gradient(const NormalizedBackwardArguments<typename L::Element> arguments) {
  LLAVA_ST_SHARED(BackwardChunk, chunk, 1);
  const NormalizedProblem& problem = arguments.problem;
  for (int64_t row = block_index(); row < problem.queries * problem.heads; row += block_count()) {
    differentiate_query<L>(arguments, row, chunk[0]);
  }
}

/// Some heads' factors for the rows of one token.
struct HeadChunk {
  float grad_score[kChunkRows], weight[kChunkRows];
  float mean_query[kChunkRows], mean_grad[kChunkRows];
  float along_key[kChunkRows], along_value[kChunkRows];  // the parts that the normalisation takes out again
};

/// A token, and the region it belongs to.
struct TokenSite {
  int64_t sample;
  Extent token, region;  // their places in the grid, and among the regions
  int64_t query;

  LLAVA_ST_DEVICE TokenSite(const NormalizedProblem& problem, int64_t index) {
    const Extent grid = problem.grid, regions = regions_of(grid, problem.region);
    const int64_t line = index / grid.w, plane = line / grid.h;
    sample = plane / grid.t;
    token = {plane - sample * grid.t, line - plane * grid.h, index - line * grid.w};
    region = {token.t / problem.region.t, token.h / problem.region.h, token.w / problem.region.w};
    query = ((sample * regions.t + region.t) * regions.h + region.h) * regions.w + region.w;
  }

  template <class T>
  LLAVA_ST_DEVICE T* row(const Operand<T>& operand) const {
    return operand.data + sample * operand.strides.sample + operand.strides.offset(token);
  }

  template <class T>
  LLAVA_ST_DEVICE const T* query_row(const Operand<const T>& operand, int64_t head) const {
    const TokenStrides& strides = operand.strides;
    return operand.data + sample * strides.sample + strides.offset(region) + head * strides.head;
  }
};

/// Writes a gradient: from a sum over heads, and how much of it lies along the normalised row.
template <class L>
LLAVA_ST_DEVICE void store_token_gradient(const RowSums<L>& sums, const typename L::Element* row,
                                          typename L::Element* gradient, Normalizer normalizer, float along) {
  RowSums<L> result = sums;
  result.add(-along / static_cast<float>(sums.width) * normalizer.inverse, row, normalizer.mean);
  result.scale(normalizer.inverse);
  result.store(gradient);
}

template <class L>
LLAVA_ST_DEVICE void differentiate_token(const NormalizedBackwardArguments<typename L::Element>& arguments,
                                         int64_t index, HeadChunk& chunk) {
  const NormalizedProblem& problem = arguments.problem;
  const int width = problem.width;
  const TokenSite site(problem, index);
  const auto* const key = site.row(arguments.key);
  const auto* const value = site.row(arguments.value);
  const Normalizer of_key = normalizer_of_row<L>(key, width, problem.eps);
  const Normalizer of_value = normalizer_of_row<L>(value, width, problem.eps);

  for (int at = 0; at < width; at += kSumChannels<L>) {
    RowSums<L> key_sums(at, width), value_sums(at, width);
    float along_key = 0.0f, along_value = 0.0f;
    for (int64_t begin = 0; begin < problem.heads; begin += kChunkRows) {
      const int count = static_cast<int>(smaller(kChunkRows, problem.heads - begin));
      block_barrier();  // the chunk before is no longer needed
      for (int i = thread_index() / kWarpSize; i < count; i += kRowWarps) {
        const float score = normalized_product<L>(key, of_key, site.query_row(arguments.query, begin + i), width);
        const float grad_weight =
            normalized_product<L>(value, of_value, site.query_row(arguments.grad_output, begin + i), width);
        if (thread_index() % kWarpSize != 0) continue;
        const QueryStatistics statistics = arguments.statistics[site.query * problem.heads + begin + i];
        const float weight = weight_of(score, statistics.base) * statistics.normalization;
        const float grad_score = weight * (grad_weight - statistics.delta);
        chunk.weight[i] = weight;
        chunk.grad_score[i] = grad_score;
        chunk.mean_query[i] = statistics.mean_query;
        chunk.mean_grad[i] = statistics.mean_grad;
        chunk.along_key[i] = grad_score * score;
        chunk.along_value[i] = weight * grad_weight;
      }
      block_barrier();
      for (int i = 0; i < count; ++i) {
        key_sums.add(chunk.grad_score[i], site.query_row(arguments.query, begin + i), chunk.mean_query[i]);
        value_sums.add(chunk.weight[i], site.query_row(arguments.grad_output, begin + i), chunk.mean_grad[i]);
        along_key += chunk.along_key[i];
        along_value += chunk.along_value[i];
      }
    }
    store_token_gradient<L>(key_sums, key, site.row(arguments.grad_key), of_key, along_key);
    store_token_gradient<L>(value_sums, value, site.row(arguments.grad_value), of_value, along_value);
  }
}

template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kRowThreads, 1)
    normalized_token_gradients(const NormalizedBackwardArguments<typename L::Element> arguments, int64_t tokens) {
  LLAVA_ST_SHARED(HeadChunk, chunk, 1);
  for (int64_t index = block_index(); index < tokens; index += block_count()) {
    differentiate_token<L>(arguments, index, chunk[0]);
  }
}

}  // namespace llava_st::cuda
