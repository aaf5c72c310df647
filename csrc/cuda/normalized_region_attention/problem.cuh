// What the kernels of normalized region attention are told: pointers, strides and sizes.
#pragma once

#include "../point_to_region_attention/site.cuh"

namespace llava_st::cuda {

struct NormalizedProblem {
  AttentionProblem attention;  // dense; its head_dim is the number of channels, which keys have without heads
  float eps;
};

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
