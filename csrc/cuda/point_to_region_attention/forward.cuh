// Point-to-region attention, forward. One warp per region and head; consecutive warps take consecutive heads of a
// region, so that a block reads whole rows of tokens. Keys and values are read once.
#pragma once

#include "chunk.cuh"

namespace llava_st::cuda {

template <class L>
LLAVA_ST_DEVICE void attend(const ForwardArguments<typename L::Element>& arguments, const Lanes<L>& lanes,
                            int64_t row) {
  const AttentionProblem& problem = arguments.problem;
  const Site site(problem, row);
  auto* output = arguments.output + row * lanes.value.head_dim;
  RowFloats<L> result;
  if (!site.has_keys) {
    result.store_sum_of_groups(output, 1.0f, lanes.value);
    return;
  }

  RowFloats<L> query(load_row<L>(site.query_row(problem, arguments.query), lanes.key, true));
  query.multiply(problem.scale * kLog2E);
  const RegionKeys<L> keys(problem, site, arguments.key, arguments.value, arguments.bias);
  RunningMaximum running;
  float sum = 0.0f;  // of the weights of this group's keys
  for (int64_t begin = 0; begin < keys.count(); begin += L::CHUNK) {
    Chunk<L> chunk;
    chunk.load(keys, lanes, begin);
    float scores[L::STEPS];
    chunk.score(query, scores);
    const float correction = running.include<L>(scores);
    if constexpr (L::MANY) {
      sum *= correction;
      result.multiply(correction);
    }
    LLAVA_ST_UNROLL
    for (int step = 0; step < L::STEPS; ++step) {
      const float weight = running.weight(scores[step]);
      sum += weight;
      result.add(weight, chunk.value[step]);
    }
    if constexpr (!L::MANY) break;
  }
  float weights = sum_over_groups<L>(sum);
  if (keys.biased() && weights == 0.0f) weights = 1.0f;  // all keys are masked: zeros
  result.store_sum_of_groups(output, 1.0f / weights, lanes.value);
}

/// Blocks per multiprocessor: the more, the better the loads of some hide the arithmetic of others. What leaves enough
/// registers for the chunk in flight, found by compiling.
template <class L>
constexpr int forward_blocks() {
  if (L::MANY || L::ELEMENTS == 1 || L::EXTENDED) return 1;
  return L::LANES == 8 ? 6 : L::LANES == 16 ? 5 : 1;
}

template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kBlockThreads, forward_blocks<L>())
    attention_forward(const ForwardArguments<typename L::Element> arguments) {
  const Lanes<L> lanes(arguments.problem);
  const int64_t rows = arguments.problem.queries * arguments.problem.heads;
  for (int64_t row = block_index() * kBlockWarps + thread_index() / kWarpSize; row < rows;
       row += block_count() * kBlockWarps) {
    attend<L>(arguments, lanes, row);
  }
}

}  // namespace llava_st::cuda
