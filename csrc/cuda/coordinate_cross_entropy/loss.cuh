// What the coordinate loss does to a tile of logits, between matrix products. Logits are float, `[tokens, classes]`.
#pragma once

#include "../../geometry/anchors.h"
#include "../elements.cuh"

namespace llava_st::cuda {

constexpr int kLossThreads = 256;
constexpr int kLossWarps = kLossThreads / kWarpSize;
constexpr int kLogitsPerThread = 8;  // in one block of the gradient kernel
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

/// The two classes that a token's label stands for and the weight of the second; a token that does not count has class
/// -1 twice. What does not exist has a weight of NaN, so that the loss is NaN.
struct LossTargets {
  int64_t* low;
  int64_t* high;
  double* ratio;
};

struct LossStatistics {
  float *largest, *sum, *target;
};

struct LabelArguments {
  const int64_t* labels;
  const int8_t* axis;
  const double* positions;
  int64_t tokens, words, ignore_index;
  int64_t temporal, height, width;  // anchors of each axis
};

/// Finds the targets and sets the statistics to those of no classes.
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kLossThreads, 1)
    find_targets(const LabelArguments arguments, const LossTargets targets, const LossStatistics statistics) {
  const int64_t token = block_index() * kLossThreads + thread_index();
  if (token >= arguments.tokens) return;
  const int64_t label = arguments.labels[token];
  const int axis = arguments.axis[token];
  Between<double> classes = {-1, -1, 0};
  if (label != arguments.ignore_index) {
    const double nothing = float_from_bits(0x7fc00000);
    if (axis >= 0 && axis < 3) {
      const int64_t anchors = axis == 0 ? arguments.temporal : axis == 1 ? arguments.height : arguments.width;
      const int64_t before = axis == 0 ? 0 : axis == 1 ? arguments.temporal : arguments.temporal + arguments.height;
      classes = coordinate_between(arguments.positions[token], anchors);
      classes.low += arguments.words + before;
      classes.high += arguments.words + before;
    } else {
      const int64_t all = arguments.words + arguments.temporal + arguments.height + arguments.width;
      const bool exists = axis == -1 && label >= 0 && label < all;
      classes = exists ? Between<double>{label, label, 0} : Between<double>{0, 0, nothing};
    }
  }
  targets.low[token] = classes.low;
  targets.high[token] = classes.high;
  targets.ratio[token] = classes.ratio;
  if (statistics.largest == nullptr) return;
  statistics.largest[token] = float_from_bits(0xff800000);  // -inf
  statistics.sum[token] = 0.0f;
  statistics.target[token] = 0.0f;
}

/// The largest of some numbers and the sum of exp(x - largest).
struct SumOfExponentials {
  float largest, sum;

  /// What is subtracted: differences of infinities would be NaN.
  LLAVA_ST_DEVICE float shift() const { return largest == float_from_bits(0xff800000) ? 0.0f : largest; }

  LLAVA_ST_DEVICE void raise(float to) {
    if (to <= largest) return;
    const float before = largest;
    largest = to;
    sum *= exp2((before - shift()) * kLog2E);
  }
  LLAVA_ST_DEVICE void add(SumOfExponentials other) {
    raise(other.largest);
    sum += other.sum * exp2((other.largest - shift()) * kLog2E);
  }
};

/// One block per token: its logits of this tile are added to its statistics.
template <int ELEMENTS>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kLossThreads, 1)
    update_statistics(const float* logits, int64_t columns, int64_t first, const LossTargets targets,
                      const LossStatistics statistics) {
  LLAVA_ST_SHARED(SumOfExponentials, of_warps, kLossWarps);
  const int64_t token = block_index();
  const int64_t low = targets.low[token];
  if (low < 0) return;  // all threads of the block
  const float* const row = logits + token * columns;
  const int thread = thread_index();
  SumOfExponentials sum = {float_from_bits(0xff800000), 0.0f};
  for (int64_t column = thread * ELEMENTS; column < columns; column += kLossThreads * ELEMENTS) {
    float values[ELEMENTS];
    unpack<float>(load_once(reinterpret_cast<const Packet<float, ELEMENTS>*>(row + column), true), values);
    float largest = values[0];
    LLAVA_ST_UNROLL
    for (int i = 1; i < ELEMENTS; ++i) largest = maximum(largest, values[i]);
    sum.raise(largest);
    const float shift = sum.shift();
    LLAVA_ST_UNROLL
    for (int i = 0; i < ELEMENTS; ++i) sum.sum += exp2((values[i] - shift) * kLog2E);
  }
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    sum.add({shuffle_xor(sum.largest, mask), shuffle_xor(sum.sum, mask)});
  }
  if (thread % kWarpSize == 0) of_warps[thread / kWarpSize] = sum;
  block_barrier();
  if (thread != 0) return;
  SumOfExponentials total = {statistics.largest[token], statistics.sum[token]};
  for (int warp = 0; warp < kLossWarps; ++warp) total.add(of_warps[warp]);
  statistics.largest[token] = total.largest;
  statistics.sum[token] = total.sum;
  const double ratio = targets.ratio[token];
  const int64_t at_low = low - first, at_high = targets.high[token] - first;
  float target = statistics.target[token];
  if (at_low >= 0 && at_low < columns) target += static_cast<float>(1 - ratio) * row[at_low];
  if (ratio != 0 && at_high >= 0 && at_high < columns) target += static_cast<float>(ratio) * row[at_high];
  statistics.target[token] = target;
}

LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kLossThreads, 1)
    finish_losses(int64_t tokens, const LossTargets targets, const LossStatistics statistics, float* losses,
                  float* logsumexp) {
  const int64_t token = block_index() * kLossThreads + thread_index();
  if (token >= tokens) return;
  float loss = 0.0f, total = 0.0f;
  if (targets.low[token] >= 0) {
    const float largest = statistics.largest[token];
    const bool infinite = largest == float_from_bits(0x7f800000);  // then the sum, of differences, is NaN
    total = infinite ? largest : largest + log2(statistics.sum[token]) * kLn2;
    loss = total - statistics.target[token];
  }
  losses[token] = loss;
  logsumexp[token] = total;
}

/// Logits become their gradients, (exp(logit - logsumexp) - weight of the class) * grad_loss, in T; perhaps in place.
/// `parts` blocks share the classes of a token.
template <class T, int ELEMENTS>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kLossThreads, 1)
    logit_gradient(const float* logits, T* gradients, int64_t columns, int64_t parts, int64_t first,
                   const LossTargets targets, const float* logsumexp, const float* grad_losses) {
  const int64_t token = block_index() / parts, part = block_index() % parts;
  const int64_t low = targets.low[token], high = targets.high[token];
  const double ratio = targets.ratio[token];
  const float of_low = static_cast<float>(1 - ratio), of_high = static_cast<float>(ratio);
  const float shift = logsumexp[token], grad = low < 0 ? 0.0f : grad_losses[token];
  const float* const from = logits + token * columns;
  T* const to = gradients + token * columns;
  LLAVA_ST_UNROLL
  for (int step = 0; step < kLogitsPerThread / ELEMENTS; ++step) {
    const int64_t column = ((part * (kLogitsPerThread / ELEMENTS) + step) * kLossThreads + thread_index()) * ELEMENTS;
    if (column >= columns) return;
    float values[ELEMENTS];
    unpack<float>(load_for_update(reinterpret_cast<const Packet<float, ELEMENTS>*>(from + column), true), values);
    LLAVA_ST_UNROLL
    for (int i = 0; i < ELEMENTS; ++i) {
      const int64_t number = first + column + i;
      float share = exp2((values[i] - shift) * kLog2E);
      if (number == low) share -= of_low;
      if (number == high && ratio != 0) share -= of_high;
      values[i] = low < 0 ? 0.0f : share * grad;
    }
    Packet<T, ELEMENTS> packet;
    pack<T>(values, packet);
    store(reinterpret_cast<Packet<T, ELEMENTS>*>(to + column), packet);
  }
}

LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kLossThreads, 1) accumulate(float* to, const float* from, int64_t count) {
  const int64_t stride = block_count() * kLossThreads;
  for (int64_t i = block_index() * kLossThreads + thread_index(); i < count; i += stride) {
    store(to + i, load_for_update(to + i, true) + load_once(from + i, true));
  }
}

}  // namespace llava_st::cuda
