// The CPU kernels' view of point-to-region attention: plain pointers and strides, no torch, so that the kernels can be
// built and run on their own (under sanitizers, in tests).
#pragma once

#include "../geometry/regions.h"
#include "parallel_loop.h"

namespace llava_st::cpu {

/// A `[sample, T, H, W, heads, D]` tensor with contiguous rows of D elements. Packed `[tokens, heads, D]` tensors keep
/// the stride of a token in `strides.w`; their other token strides follow from each video's grid.
struct Operand {
  void* data;
  TokenStrides strides;
};

struct AttentionProblem {
  int64_t queries;  // regions of all samples together
  int64_t heads, head_dim, value_dim;
  double scale;
  Extent region;

  Extent grid;  // of every sample, where the batch is dense

  const PackedOffset* offsets = nullptr;  // where the batch is packed
  const Extent* grids = nullptr;
  int64_t videos = 0;

  int64_t largest_region = 0;  // in tokens

  LLAVA_ST_HOST_DEVICE bool packed() const { return offsets != nullptr; }
};

/// A bias has rows of one number. Without one its data, and that of its gradient, is null.
struct ForwardOperands {
  Operand query, key, value, output;
  Operand bias = {};
};

struct BackwardOperands {
  Operand grad_output, query, key, value;
  Operand grad_query, grad_key, grad_value;
  Operand bias = {}, grad_bias = {};
};

/// Both return false when scratch memory could not be had (errors must not cross the loop).
using Forward = bool (*)(const AttentionProblem&, const ForwardOperands&, const ParallelLoop&);
using Backward = bool (*)(const AttentionProblem&, const BackwardOperands&, const ParallelLoop&);

/// Attention over normalised keys and values that all heads share: `strides.head` of these has no meaning. Batches are
/// dense, values are as wide as keys, and `scale` and biases are not used.
struct NormalizedProblem {
  AttentionProblem attention;
  double eps;
};
using NormalizedForward = bool (*)(const NormalizedProblem&, const ForwardOperands&, const ParallelLoop&);
using NormalizedBackward = bool (*)(const NormalizedProblem&, const BackwardOperands&, const ParallelLoop&);

/// The kernels of one instruction set, by Element.
struct AttentionKernels {
  const char* instruction_set;
  Forward forward[kElements];
  Backward backward[kElements];
  NormalizedForward normalized_forward[kElements];
  NormalizedBackward normalized_backward[kElements];
};

const AttentionKernels& baseline_attention_kernels();
#if defined(__x86_64__)
const AttentionKernels& avx2_attention_kernels();
#endif

}  // namespace llava_st::cpu
