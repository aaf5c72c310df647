// What the kernels of normalized region attention are told: pointers, strides and sizes.
#pragma once

#include "../../geometry/regions.h"
#include "../divisor.cuh"
#include "../operand.cuh"

namespace llava_st::cuda {

struct NormalizedProblem {
  int64_t queries;  // regions of all samples together
  int64_t heads;
  int width;  // channels of a row
  float eps;
  Extent grid, region;
  Divisor by_heads, by_regions, by_regions_h, by_regions_w;
};

/// Tokens have no heads: their strides along these are zero.
template <class T>
struct NormalizedForwardArguments {
  NormalizedProblem problem;
  Operand<const T> query, key, value;
  T* output;  // contiguous, like all results
};

/// What the gradients of a region's tokens depend on besides rows, for one head.
struct QueryStatistics {
  float base;           // what scores are taken relative to
  float normalization;  // 1 over the sum of the weights
  float delta;          // the sum of weights times gradients of weights
  float mean_query, mean_grad;
};

template <class T>
struct NormalizedBackwardArguments {
  NormalizedProblem problem;
  Operand<const T> grad_output, query, key, value;
  T* grad_query;
  Operand<T> grad_key, grad_value;
  QueryStatistics* statistics;  // scratch memory: of each query and head
};

}  // namespace llava_st::cuda
