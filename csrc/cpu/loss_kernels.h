// What the coordinate loss does to a tile of logits, between matrix products. Compiled once per instruction set.
#pragma once

#include "position_problem.h"
#include "softmax.h"

namespace llava_st::LLAVA_ST_ISA {

template <class S>
LLAVA_ST_INLINE S largest_of(const S* row, int64_t columns, S largest) {
  int64_t c = 0;
  if (columns >= kLanes) {
    auto all = load(row);
    for (c = kLanes; c + kLanes <= columns; c += kLanes) {
      const auto these = load(row + c);
      all = these > all ? these : all;
    }
    for (int lane = 0; lane < kLanes; ++lane) largest = all[lane] > largest ? all[lane] : largest;
  }
  for (; c < columns; ++c) largest = row[c] > largest ? row[c] : largest;
  return largest;
}

/// The sum of exp(x - largest). NaN in the row gives NaN.
template <class S>
LLAVA_ST_INLINE S sum_of_exponentials(const S* row, int64_t columns, S largest) {
  Vector<S> sums = {};
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) sums += exponential(load(row + c) - largest);
  S sum = sum_of_lanes(sums);
  if (c < columns) {
    const int64_t rest = columns - c;
    const auto last = exponential(load_first(row + c, rest) - largest);
    for (int64_t lane = 0; lane < rest; ++lane) sum += last[lane];
  }
  return sum;
}

template <class S>
void update_statistics(const cpu::Logits& logits, const cpu::Targets& targets, const cpu::Statistics& statistics,
                       const cpu::ParallelLoop& loop) {
  constexpr S kInfinity = __builtin_inf();
  S* const largest = static_cast<S*>(statistics.largest);
  S* const sum = static_cast<S*>(statistics.sum);
  S* const target = static_cast<S*>(statistics.target);
  cpu::run_parallel(loop, logits.rows, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      if (targets.low[token] < 0) continue;
      const S* const row = static_cast<const S*>(logits.data) + token * logits.columns;
      const S before = largest[token];
      const S now = largest_of(row, logits.columns, before);
      largest[token] = now;
      if (now == kInfinity) {
        sum[token] = 1;  // the logarithm of the sum is infinite
      } else {
        // Where all were -inf there is nothing yet, and differences of infinities would be NaN.
        const S kept = before == -kInfinity ? 0 : sum[token] * exponential(Vector<S>{} + (before - now))[0];
        sum[token] = kept + sum_of_exponentials(row, logits.columns, now == -kInfinity ? S{0} : now);
      }
      const int64_t low = targets.low[token] - logits.first, high = targets.high[token] - logits.first;
      const double ratio = targets.ratio[token];
      if (low >= 0 && low < logits.columns) target[token] += static_cast<S>(1 - ratio) * row[low];
      if (ratio != 0 && high >= 0 && high < logits.columns) target[token] += static_cast<S>(ratio) * row[high];
    }
    return true;
  });
}

template <class S>
void logit_gradient(const cpu::Logits& logits, const cpu::Targets& targets, const void* logsumexp,
                    const void* grad_losses, const cpu::ParallelLoop& loop) {
  cpu::run_parallel(loop, logits.rows, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      S* const row = static_cast<S*>(logits.data) + token * logits.columns;
      if (targets.low[token] < 0) {
        memset(row, 0, logits.columns * sizeof(S));
        continue;
      }
      const S shift = static_cast<const S*>(logsumexp)[token];
      const S grad = static_cast<const S*>(grad_losses)[token];
      int64_t c = 0;
      for (; c + kLanes <= logits.columns; c += kLanes) store(row + c, exponential(load(row + c) - shift) * grad);
      const int64_t rest = logits.columns - c;
      if (rest > 0) store_first(row + c, exponential(load_first(row + c, rest) - shift) * grad, rest);
      const int64_t low = targets.low[token] - logits.first, high = targets.high[token] - logits.first;
      const double ratio = targets.ratio[token];
      if (low >= 0 && low < logits.columns) row[low] -= static_cast<S>(1 - ratio) * grad;
      if (ratio != 0 && high >= 0 && high < logits.columns) row[high] -= static_cast<S>(ratio) * grad;
    }
    return true;
  });
}

template <class S>
void accumulate(void* to, const void* from, int64_t count, const cpu::ParallelLoop& loop) {
  constexpr int64_t kPart = 4096;
  cpu::run_parallel(loop, ceil_div(count, kPart), [&](int64_t begin, int64_t end) {
    const int64_t last = smaller(end * kPart, count);
    for (int64_t i = begin * kPart; i < last; ++i) static_cast<S*>(to)[i] += static_cast<const S*>(from)[i];
    return true;
  });
}

}  // namespace llava_st::LLAVA_ST_ISA
