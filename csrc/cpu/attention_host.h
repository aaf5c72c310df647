// From checked calls of either attention to what the CPU kernels are told.
#pragma once

#include <algorithm>

#include "../attention_call.h"
#include "attention_problem.h"
#include "host.h"

namespace llava_st::cpu {

inline int64_t tokens_of_largest_region(Extent grid, Extent region) {
  return Extent{std::min(grid.t, region.t), std::min(grid.h, region.h), std::min(grid.w, region.w)}.count();
}

/// A batch of videos of one size.
inline AttentionProblem dense_problem(int64_t batch, Extent grid, Extent region, int64_t heads, int64_t head_dim,
                                      double scale) {
  AttentionProblem problem;
  problem.queries = batch * regions_of(grid, region).count();
  problem.heads = heads;
  problem.head_dim = head_dim;
  problem.value_dim = head_dim;
  problem.scale = scale;
  problem.region = region;
  problem.grid = grid;
  problem.largest_region = tokens_of_largest_region(grid, region);
  return problem;
}

/// Raises where a kernel found no scratch memory.
inline void check_scratch(const char* op, bool found, const AttentionProblem& problem) {
  LLAVA_ST_CHECK(found, op, ": out of memory allocating scratch memory for regions of ", problem.largest_region,
                 " tokens on cpu");
}

}  // namespace llava_st::cpu
