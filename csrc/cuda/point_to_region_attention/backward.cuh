// Point-to-region attention, backward. The weights are computed anew. Regions do not overlap, so the warp of a region
// and head is the only writer of its gradients. Where the region fits one chunk, keys and values are read once; else
// twice.
//
// With weights p and their gradients g (grad_output . value):
//   grad_value = p grad_output,  grad_key = scale p (g - delta) query,  grad_query = sum of scale p (g - delta) key,
//   delta = sum of p g.
#pragma once

#include "chunk.cuh"

namespace llava_st::cuda {

/// What the gradients of one key depend on besides the key, for one query.
template <class L>
struct KeySums {
  RunningMaximum running;
  float weights = 0.0f;  // their sum
  float delta = 0.0f;    // the sum of weights times gradients of weights

  LLAVA_ST_DEVICE void include(const float (&scores)[L::STEPS], const float (&grad_weights)[L::STEPS]) {
    const float correction = running.template include<L>(scores);
    if constexpr (L::MANY) {
      weights *= correction;
      delta *= correction;
    }
    LLAVA_ST_UNROLL
    for (int step = 0; step < L::STEPS; ++step) {
      const float weight = running.weight(scores[step]);
      weights += weight;
      delta += weight * grad_weights[step];
    }
  }
};

template <class L>
LLAVA_ST_DEVICE void load_and_score(Chunk<L>& chunk, const RegionKeys<L>& keys, const Lane<L>& lane, int64_t begin,
                                    const RowFloats<L>& query, const RowFloats<L>& grad_output,
                                    float (&scores)[L::STEPS], float (&grad_weights)[L::STEPS]) {
  chunk.load(keys, lane, begin);
  chunk.score(query, scores);
  LLAVA_ST_UNROLL
  for (int step = 0; step < L::STEPS; ++step) grad_weights[step] = grad_output.dot(chunk.value[step]);
}

template <class L>
LLAVA_ST_DEVICE void differentiate(const BackwardArguments<typename L::Element>& arguments, const Lane<L>& lane,
                                   int64_t row) {
  const AttentionProblem& problem = arguments.problem;
  const Site site(problem, row);
  auto* grad_query_row = arguments.grad_query + row * problem.head_dim;
  RowFloats<L> grad_query;
  if (!site.has_keys) {
    grad_query.store_sum_of_groups(grad_query_row, 1.0f, lane);
    return;
  }

  RowFloats<L> query(load_row<L>(site.query_row(problem, arguments.query), lane, true));
  query.multiply(problem.scale * kLog2E);
  const RowFloats<L> grad_output(load_row<L>(site.query_row(problem, arguments.grad_output), lane, true));
  const RegionKeys<L> keys(problem, site, arguments.key, arguments.value);
  Chunk<L> chunk;
  float scores[L::STEPS], grad_weights[L::STEPS];
  KeySums<L> sums;
  for (int64_t begin = 0; begin < keys.count(); begin += L::CHUNK) {
    load_and_score<L>(chunk, keys, lane, begin, query, grad_output, scores, grad_weights);
    sums.include(scores, grad_weights);
    if constexpr (!L::MANY) break;
  }
  const float all_weights = sum_over_groups<L>(sums.weights);
  const float normalization = 1.0f / all_weights;
  // Gradients of weights often cancel against delta, so it is not spared the division.
  const float delta = sum_over_groups<L>(sums.delta) / all_weights;

  const RegionRows<typename L::Element> grad_keys(problem, site, arguments.grad_key);
  const RegionRows<typename L::Element> grad_values(problem, site, arguments.grad_value);
  for (int64_t begin = 0; begin < keys.count(); begin += L::CHUNK) {
    if constexpr (L::MANY) {
      load_and_score<L>(chunk, keys, lane, begin, query, grad_output, scores, grad_weights);
    }
    LLAVA_ST_UNROLL
    for (int step = 0; step < L::STEPS; ++step) {
      const float weight = sums.running.weight(scores[step]) * normalization;
      const float grad_score = weight * (grad_weights[step] - delta);
      grad_query.add(grad_score, chunk.key[step]);
      if (chunk.exists[step]) {
        const Place place = keys.place(chunk.number(lane, begin, step));
        // The query carries scale * log2(e) already.
        store_row<L>(grad_keys.at(place), query.times(grad_score * kLn2), lane);
        store_row<L>(grad_values.at(place), grad_output.times(weight), lane);
      }
    }
    if constexpr (!L::MANY) break;
  }
  grad_query.store_sum_of_groups(grad_query_row, problem.scale, lane);
}

template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kBlockThreads, 1)
    attention_backward(const BackwardArguments<typename L::Element> arguments) {
  const Lane<L> lane(arguments.problem.head_dim);
  const int64_t rows = arguments.problem.queries * arguments.problem.heads;
  for (int64_t row = block_index() * kBlockWarps + thread_index() / kWarpSize; row < rows;
       row += block_count() * kBlockWarps) {
    differentiate<L>(arguments, lane, row);
  }
}

}  // namespace llava_st::cuda
