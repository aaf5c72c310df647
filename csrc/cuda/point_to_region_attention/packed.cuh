// Gradients of tokens that belong to no query of a packed batch.
#pragma once

#include "layout.cuh"
#include "problem.cuh"

namespace llava_st::cuda {

/// The first token that may belong to no query, because the grids hold fewer tokens than there are, or more regions.
LLAVA_ST_DEVICE int64_t first_key_without_query(const AttentionProblem& problem) {
  const PackedOffset total = problem.offsets[problem.videos];
  if (total.query <= problem.queries) return total.key;
  return problem.offsets[video_of_query(problem.offsets, problem.videos, problem.queries)].key;
}

LLAVA_ST_DEVICE bool has_query(const AttentionProblem& problem, int64_t key) {
  if (key >= problem.offsets[problem.videos].key) return false;
  const int64_t video = video_of_key(problem.offsets, problem.videos, key);
  const PackedOffset begin = problem.offsets[video];
  const Extent grid = problem.grids[video];
  const Extent regions = regions_of(grid, problem.region);
  const int64_t token = key - begin.key;
  const Extent at = {token / grid.w / grid.h / problem.region.t, token / grid.w % grid.h / problem.region.h,
                     token % grid.w / problem.region.w};
  return begin.query + packed_strides(regions, 1, 0).offset(at) < problem.queries;
}

/// Sets the gradients of tokens without a query to zero. With correct grids there are none, and nothing is written.
template <class T>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kBlockThreads, 1)
    zero_keys_without_query(const AttentionProblem problem, T* grad_key, T* grad_value, T* grad_bias) {
  const auto zero = [](T* gradient, int64_t key, int64_t row) {
    for (int64_t i = thread_index(); i < row; i += kBlockThreads) gradient[key * row + i] = T{};
  };
  for (int64_t key = first_key_without_query(problem) + block_index(); key < problem.keys; key += block_count()) {
    if (has_query(problem, key)) continue;
    zero(grad_key, key, problem.heads * problem.head_dim);
    zero(grad_value, key, problem.heads * problem.value_dim);
    if (grad_bias != nullptr) zero(grad_bias, key, problem.heads);
  }
}

}  // namespace llava_st::cuda
