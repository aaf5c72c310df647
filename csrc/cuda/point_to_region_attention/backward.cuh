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
LLAVA_ST_DEVICE void load_and_score(Chunk<L>& chunk, const RegionKeys<L>& keys, const Lanes<L>& lanes, int64_t begin,
                                    const RowFloats<L>& query, const RowFloats<L>& grad_output,
                                    float (&scores)[L::STEPS], float (&grad_weights)[L::STEPS]) {
  chunk.load(keys, lanes, begin);
  chunk.score(query, scores);
  LLAVA_ST_UNROLL
  for (int step = 0; step < L::STEPS; ++step) {
    grad_weights[step] = grad_output.dot(chunk.value[step]);
    if constexpr (L::EXTENDED) grad_weights[step] = chunk.exists[step] ? grad_weights[step] : 0.0f;  // not 0 * NaN
  }
}

/// Gradients of masked keys, and those of biases, which are those of scores.
template <class L>
LLAVA_ST_DEVICE void store_extended(const BackwardArguments<typename L::Element>& arguments, const RegionKeys<L>& keys,
                                    const Chunk<L>& chunk, const Lanes<L>& lanes, int64_t begin, int step,
                                    float grad_score) {
  using T = typename L::Element;
  const Place place = keys.place(chunk.number(lanes.key, begin, step));
  if (chunk.masked[step]) {
    const RowPackets<L> zeros = RowFloats<L>().times(1.0f);
    store_row<L>(RegionRows<T>(keys.problem, keys.site, arguments.grad_key).at(place), zeros, lanes.key);
    store_row<L>(RegionRows<T>(keys.problem, keys.site, arguments.grad_value).at(place), zeros, lanes.value);
  }
  if (keys.biased() && lanes.key.element == 0 && (chunk.exists[step] || chunk.masked[step])) {
    const float rounded = chunk.masked[step] ? 0.0f : grad_score;
    T gradient;
    pack<T>(&rounded, gradient);
    store(RegionRows<T>(keys.problem, keys.site, arguments.grad_bias).at(place), gradient);
  }
}

template <class L>
LLAVA_ST_DEVICE void differentiate(const BackwardArguments<typename L::Element>& arguments, const Lanes<L>& lanes,
                                   int64_t row) {
  const AttentionProblem& problem = arguments.problem;
  const Site site(problem, row);
  auto* grad_query_row = arguments.grad_query + row * problem.head_dim;
  RowFloats<L> grad_query;
  if (!site.has_keys) {
    grad_query.store_sum_of_groups(grad_query_row, 1.0f, lanes.key);
    return;
  }

  RowFloats<L> query(load_row<L>(site.query_row(problem, arguments.query), lanes.key, true));
  query.multiply(problem.scale * kLog2E);
  const RowFloats<L> grad_output(load_row<L>(site.query_row(problem, arguments.grad_output), lanes.value, true));
  const RegionKeys<L> keys(problem, site, arguments.key, arguments.value, arguments.bias);
  Chunk<L> chunk;
  float scores[L::STEPS], grad_weights[L::STEPS];
  KeySums<L> sums;
  for (int64_t begin = 0; begin < keys.count(); begin += L::CHUNK) {
    load_and_score<L>(chunk, keys, lanes, begin, query, grad_output, scores, grad_weights);
    sums.include(scores, grad_weights);
    if constexpr (!L::MANY) break;
  }
  float all_weights = sum_over_groups<L>(sums.weights);
  if (keys.biased() && all_weights == 0.0f) all_weights = 1.0f;  // all keys are masked: no gradients
  const float normalization = 1.0f / all_weights;
  // Gradients of weights often cancel against delta, so it is not spared the division.
  const float delta = sum_over_groups<L>(sums.delta) / all_weights;

  const RegionRows<typename L::Element> grad_keys(problem, site, arguments.grad_key);
  const RegionRows<typename L::Element> grad_values(problem, site, arguments.grad_value);
  for (int64_t begin = 0; begin < keys.count(); begin += L::CHUNK) {
    if constexpr (L::MANY) {
      load_and_score<L>(chunk, keys, lanes, begin, query, grad_output, scores, grad_weights);
    }
    LLAVA_ST_UNROLL
    for (int step = 0; step < L::STEPS; ++step) {
      const float weight = sums.running.weight(scores[step]) * normalization;
      const float grad_score = weight * (grad_weights[step] - delta);
      grad_query.add(grad_score, chunk.key[step]);
      if (chunk.exists[step]) {
        const Place place = keys.place(chunk.number(lanes.key, begin, step));
        // The query carries scale * log2(e) already.
        store_row<L>(grad_keys.at(place), query.times(grad_score * kLn2), lanes.key);
        store_row<L>(grad_values.at(place), grad_output.times(weight), lanes.value);
      }
      if constexpr (L::EXTENDED) store_extended<L>(arguments, keys, chunk, lanes, begin, step, grad_score);
    }
    if constexpr (!L::MANY) break;
  }
  grad_query.store_sum_of_groups(grad_query_row, problem.scale, lanes.key);
}

template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kBlockThreads, 1)
    attention_backward(const BackwardArguments<typename L::Element> arguments) {
  const Lanes<L> lanes(arguments.problem);
  const int64_t rows = arguments.problem.queries * arguments.problem.heads;
  for (int64_t row = block_index() * kBlockWarps + thread_index() / kWarpSize; row < rows;
       row += block_count() * kBlockWarps) {
    differentiate<L>(arguments, lanes, row);
  }
}

}  // namespace llava_st::cuda
