// The CPU kernels' view of LAPE and of the coordinate loss: plain pointers and strides, no torch, so that the kernels
// can be built and run on their own (under sanitizers, in tests). "Computed type" is float, and double for double.
#pragma once

#include "../geometry/anchors.h"
#include "parallel_loop.h"

namespace llava_st::cpu {

/// A table of anchors with contiguous rows of the computed type.
struct Table {
  const void* rows;
  int64_t count;
};

/// The tables of time, height and width; `alignment` is that of the latter two.
struct Tables {
  Table axis[3];
  int64_t channels;
  Alignment alignment;

  LLAVA_ST_HOST_DEVICE Alignment alignment_of(int number) const { return number == 0 ? Alignment::kEnds : alignment; }
  LLAVA_ST_HOST_DEVICE int64_t rows() const { return axis[0].count + axis[1].count + axis[2].count; }
};

/// Videos of one size, `[samples, T, H, W, C]`, with contiguous rows of C elements (`strides.head` has no meaning).
struct Videos {
  void* data;
  int64_t samples;
  Extent grid;
  TokenStrides strides;
};

/// to = from + tables, resized to the grid. `resized` has room for T + H + W rows of the computed type. `round`: every
/// resized row and every sum is rounded to the elements' type.
using Add = void (*)(const Tables&, const Videos& from, const Videos& to, bool round, void* resized,
                     const ParallelLoop&);

/// Rows of patches `begin` to `end` of one group of videos, counted through all frames and samples, and which row of
/// the scratch memory their sums begin at.
struct Segment {
  int64_t group, begin, end, first;

  /// How many frames it has a part of.
  LLAVA_ST_HOST_DEVICE int64_t frames(Extent grid) const { return (end - 1) / grid.h - begin / grid.h + 1; }
  /// Rows of scratch memory: sums over frames, rows and columns, and one to work with.
  LLAVA_ST_HOST_DEVICE int64_t scratch_rows(Extent grid) const { return frames(grid) + grid.h + grid.w + 1; }
};

/// How far apart rows of the scratch memory are: whole vectors.
LLAVA_ST_HOST_DEVICE int64_t segment_stride(int64_t channels) { return ceil_div(channels, 8) * 8; }

/// The gradients of the three tables, one after the other, as `tables.rows()` rows of doubles, from those of groups of
/// videos, cut into segments. `scratch` has the rows that they ask for, of the computed type.
using AddBackward = void (*)(const Tables&, const Videos* groups, const Segment* segments, int64_t count, void* scratch,
                             double* result, const ParallelLoop&);

/// What lape_scatter reads: rows of elements, `stride` apart, and one entry per token.
struct ScatterSources {
  const void *embed, *visual;
  int64_t embed_stride, visual_stride, words;
  const int64_t *input_ids, *visual_index;
  const int8_t* axis;
  const double* positions;
};
using Scatter = void (*)(const Tables&, const ScatterSources&, int64_t tokens, void* output, const ParallelLoop&);

/// Entries in ascending order of destination: a share of a row of the gradient each.
struct ScatteredGradient {
  const int64_t *destination, *token;
  const double* share;
  int64_t entries;
  const void* rows;
  int64_t stride, channels;
};
/// The sums for destinations `first` to `first + count`, contiguous in `output`, of the elements' type or, `wide`, of
/// the computed type.
using Gather = void (*)(const ScatteredGradient&, int64_t first, int64_t count, bool wide, void* output,
                        const ParallelLoop&);

/// The two classes that a token's label stands for and the weight of the second; a token that does not count has class
/// -1 twice.
struct Targets {
  const int64_t *low, *high;
  const double* ratio;
};
/// Logits of `rows` tokens and `columns` classes from `first` on, contiguous, of the computed type.
struct Logits {
  void* data;
  int64_t rows, columns, first;
};
/// Running statistics of each token over all classes so far, of the computed type: the largest logit, the sum of
/// exp(logit - largest), and the target's weighted logit.
struct Statistics {
  void *largest, *sum, *target;
};
using UpdateStatistics = void (*)(const Logits&, const Targets&, const Statistics&, const ParallelLoop&);
/// Logits become their own gradients: (exp(logit - logsumexp) - weight of the class) * grad_loss.
using LogitGradient = void (*)(const Logits&, const Targets&, const void* logsumexp, const void* grad_losses,
                               const ParallelLoop&);
/// to += from, of the computed type.
using Accumulate = void (*)(void* to, const void* from, int64_t count, const ParallelLoop&);

/// What follows the product of a linear layer, `[samples, T, H, W, channels]` like all elements here, contiguous: bias
/// and the rows of three tables, of the computed type, are added, and the GELU is taken. The product may be the memory
/// of a result; `preactivation` is null where it is not wanted.
struct PositionGelu {
  const void* product;
  void *preactivation, *activation;
  const void *bias, *temporal, *height, *width;
  int64_t samples;
  Extent grid;
  int64_t channels;
};
/// False when scratch memory could not be had.
using AddPositionGelu = bool (*)(const PositionGelu&, const ParallelLoop&);

/// The gradient of an activation becomes that of the preactivation, whose rows are `stride` apart; and the activation.
struct GeluGradient {
  void *gradient, *activation;
  const void* preactivation;
  int64_t tokens, channels, stride;
};
using TakeGeluGradient = void (*)(const GeluGradient&, const ParallelLoop&);

/// The kernels of one instruction set, by Element. What has only the computed type comes for float and double.
struct PositionKernels {
  Add add[kElements];
  AddBackward add_backward[kElements];
  Scatter scatter[kElements];
  Gather gather[kElements];
  UpdateStatistics update_statistics[2];
  LogitGradient logit_gradient[2];
  Accumulate accumulate[2];
  AddPositionGelu position_gelu[kElements];
  TakeGeluGradient gelu_gradient[kElements];
};

const PositionKernels& baseline_position_kernels();
#if defined(__x86_64__)
const PositionKernels& avx2_position_kernels();
#endif

}  // namespace llava_st::cpu
