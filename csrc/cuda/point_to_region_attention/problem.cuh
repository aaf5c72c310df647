// What the kernels of point-to-region attention are told: pointers, strides and sizes.
#pragma once

#include "../../geometry/regions.h"
#include "../divisor.cuh"
#include "../operand.cuh"

namespace llava_st::cuda {

struct AttentionProblem {
  int64_t queries;  // regions of all samples together
  int64_t heads;
  int head_dim, value_dim;
  float scale;
  Extent region;

  Divisor by_heads;

  // Where the batch is dense: the grid of every sample, and the numbers of its regions.
  Extent grid;
  Divisor by_regions, by_regions_h, by_regions_w;

  // Where the batch is packed: see packed_grids.cuh. All of it is on the device.
  const PackedOffset* offsets;
  const Extent* grids;
  int64_t videos;
  int64_t keys;  // tokens there are, whatever the grids say

  LLAVA_ST_HOST_DEVICE bool packed() const { return offsets != nullptr; }
};

template <class T>
struct ForwardArguments {
  AttentionProblem problem;
  Operand<const T> query, key, value;
  T* output;              // contiguous, like all results
  Operand<const T> bias;  // rows of one number; without one its data is null
};

template <class T>
struct BackwardArguments {
  AttentionProblem problem;
  Operand<const T> grad_output, query, key, value;
  T* grad_query;
  Operand<T> grad_key, grad_value;
  Operand<const T> bias;
  Operand<T> grad_bias;
};

}  // namespace llava_st::cuda
