// Forward and backward of point-to-region attention on a CPU, compiled once per instruction set (see vectors.h).
//
// The work is bound by memory: keys and values are read once, in the order they lie in memory (all heads of a token,
// all tokens along the width, several regions at a time). Regions do not overlap, so every gradient has one writer and
// the result does not depend on the number of threads.
#pragma once

#include "attention_problem.h"
#include "normalized_attention_kernels.h"
#include "rows.h"
#include "scratch.h"
#include "softmax.h"
#include "strip.h"

namespace llava_st::LLAVA_ST_ISA {

constexpr int64_t kStripBytes = 128 << 10;  // half of a small second-level cache

/// The heads of a strip that one unit of work is about. Rows of the query side are numbered region by region, `count`
/// of them per region.
struct Heads {
  int64_t first, count;
};

/// products.row(row)[j] = wide_row(row) . token j of the row's region and head.
template <class T, class WideRow>
LLAVA_ST_INLINE void dot_tokens(const Strip& strip, Heads heads, const Tokens<const T>& tokens, int64_t dim,
                                WideRow wide_row, const ScoreRows<Scalar<T>>& products) {
  strip.for_tokens(tokens.strides, [&](int64_t r, int64_t j, int64_t offset) {
    for (int64_t h = 0; h < heads.count; ++h) {
      const T* const token = tokens.first + offset + (heads.first + h) * tokens.strides.head;
      prefetch_after(token, dim * sizeof(T));
      const int64_t row = r * heads.count + h;
      products.row(row)[j] = dot(wide_row(row), token, dim);
    }
  });
}

/// wide_sum(row) += sum over j of weights.row(row)[j] * token j of the row's region and head.
template <class T, class WideSum>
LLAVA_ST_INLINE void add_tokens(const Strip& strip, Heads heads, const Tokens<const T>& tokens, int64_t dim,
                                const ScoreRows<Scalar<T>>& weights, WideSum wide_sum) {
  strip.for_tokens(tokens.strides, [&](int64_t r, int64_t j, int64_t offset) {
    for (int64_t h = 0; h < heads.count; ++h) {
      const T* const token = tokens.first + offset + (heads.first + h) * tokens.strides.head;
      prefetch_after(token, dim * sizeof(T));
      const int64_t row = r * heads.count + h;
      add_scaled(token, weights.row(row)[j], dim, wide_sum(row));
    }
  });
}

/// Token j of the row's region and head = factors.row(row)[j] * wide_row(row).
template <bool streamed, class T, class WideRow>
LLAVA_ST_INLINE void write_tokens(const Strip& strip, Heads heads, const Tokens<T>& tokens, int64_t dim,
                                  WideRow wide_row, const ScoreRows<Scalar<T>>& factors) {
  strip.for_tokens(tokens.strides, [&](int64_t r, int64_t j, int64_t offset) {
    for (int64_t h = 0; h < heads.count; ++h) {
      const int64_t row = r * heads.count + h;
      write_scaled<streamed>(wide_row(row), factors.row(row)[j], dim,
                             tokens.first + offset + (heads.first + h) * tokens.strides.head);
    }
  });
}

/// The memory of row number `row` of the query side: one region and head.
template <class T>
LLAVA_ST_INLINE T* query_row(const Tokens<T>& queries, Heads heads, int64_t row) {
  return queries.first + row / heads.count * queries.strides.w +
         (heads.first + row % heads.count) * queries.strides.head;
}

/// How the work is cut. Each thread takes queries in order, in strips of at most `regions`; where there are too few
/// queries to keep all threads busy, a unit of work is one query and one of `groups` groups of heads.
struct Cut {
  int64_t regions = 1;
  int64_t groups = 1;

  /// A strip should not need more memory than stays in the cache: `bytes` per region.
  Cut(const AttentionProblem& problem, int64_t threads, int64_t bytes) {
    const int64_t enough = 4 * threads;
    if (problem.queries < enough) {
      groups = smaller(problem.heads, ceil_div(enough, problem.queries));
    } else {
      regions = smaller(kStripBytes / bytes, problem.queries / enough);
      if (regions < 1) regions = 1;
    }
  }

  int64_t units(const AttentionProblem& problem) const { return problem.queries * groups; }
  int64_t most_heads(const AttentionProblem& problem) const { return ceil_div(problem.heads, groups); }

  Heads heads_of(const AttentionProblem& problem, int64_t unit) const {
    const int64_t group = unit % groups;
    const int64_t first = group * problem.heads / groups;
    return {first, (group + 1) * problem.heads / groups - first};
  }
};

template <class T>
bool forward(const AttentionProblem& problem, const cpu::ForwardOperands& operands, const cpu::ParallelLoop& loop) {
  using S = Scalar<T>;
  const int64_t dim = problem.head_dim;
  const S scale = static_cast<S>(problem.scale);
  const Cut cut(problem, loop.threads, 2 * problem.heads * dim * sizeof(S));

  return cpu::run_parallel(loop, cut.units(problem), [&](int64_t begin, int64_t end) {
    const int64_t most_rows = cut.regions * cut.most_heads(problem);
    Scratch<S> scratch(ScoreRows<S>::reserve(most_rows, problem.largest_region), 2 * most_rows, dim);
    if (scratch.failed()) return false;

    for (int64_t unit = begin; unit < end;) {
      const Strip strip(problem, unit / cut.groups, smaller(cut.regions, end - unit));
      const Heads heads = cut.heads_of(problem, unit);
      unit += strip.count;
      const int64_t rows = strip.count * heads.count;
      const ScoreRows<S> weights = {scratch.weights(), rows, strip.stride()};
      const auto keys_of_row = [&](int64_t row) { return strip.tokens_of(row / heads.count); };
      const auto queries = strip.queries_of<const T>(problem, operands.query);
      const auto outputs = strip.queries_of<T>(problem, operands.output);
      const auto wide_query = [&](int64_t row) { return scratch.row(row); };
      const auto wide_output = [&](int64_t row) { return scratch.row(rows + row); };

      for (int64_t row = 0; row < rows; ++row) {
        widen(query_row(queries, heads, row), scale, dim, wide_query(row));
        scratch.clear_row(rows + row);
      }
      dot_tokens(strip, heads, strip.keys_of<const T>(problem, operands.key), dim, wide_query, weights);
      softmax(weights, keys_of_row);
      add_tokens(strip, heads, strip.keys_of<const T>(problem, operands.value), dim, weights, wide_output);
      for (int64_t row = 0; row < rows; ++row) {
        write_scaled<false>(wide_output(row), static_cast<S>(1), dim, query_row(outputs, heads, row));
      }
    }
    return true;
  });
}

template <bool streamed, class T>
bool backward_with(const AttentionProblem& problem, const cpu::BackwardOperands& operands,
                   const cpu::ParallelLoop& loop) {
  using S = Scalar<T>;
  const int64_t dim = problem.head_dim;
  const S scale = static_cast<S>(problem.scale);
  const Cut cut(problem, loop.threads, 3 * problem.heads * dim * sizeof(S));

  return cpu::run_parallel(loop, cut.units(problem), [&](int64_t begin, int64_t end) {
    const int64_t most_rows = cut.regions * cut.most_heads(problem);
    const int64_t most_scores = ScoreRows<S>::reserve(most_rows, problem.largest_region);
    Scratch<S> scratch(2 * most_scores, 3 * most_rows, dim);
    if (scratch.failed()) return false;

    for (int64_t unit = begin; unit < end;) {
      const Strip strip(problem, unit / cut.groups, smaller(cut.regions, end - unit));
      const Heads heads = cut.heads_of(problem, unit);
      unit += strip.count;
      const int64_t rows = strip.count * heads.count;
      const auto queries = strip.queries_of<const T>(problem, operands.query);
      const auto grad_outputs = strip.queries_of<const T>(problem, operands.grad_output);
      const auto grad_queries = strip.queries_of<T>(problem, operands.grad_query);
      const auto keys = strip.keys_of<const T>(problem, operands.key);
      const auto wide_query = [&](int64_t row) { return scratch.row(row); };
      const auto wide_grad_output = [&](int64_t row) { return scratch.row(rows + row); };
      const auto wide_grad_query = [&](int64_t row) { return scratch.row(2 * rows + row); };
      const ScoreRows<S> weights = {scratch.weights(), rows, strip.stride()};
      const ScoreRows<S> grad_scores = {scratch.weights() + most_scores, rows, strip.stride()};
      const auto keys_of_row = [&](int64_t row) { return strip.tokens_of(row / heads.count); };

      for (int64_t row = 0; row < rows; ++row) {
        widen(query_row(queries, heads, row), scale, dim, wide_query(row));
        widen(query_row(grad_outputs, heads, row), static_cast<S>(1), dim, wide_grad_output(row));
        scratch.clear_row(2 * rows + row);
      }
      // Values before keys: the keys are wanted a second time, soon.
      dot_tokens(strip, heads, strip.keys_of<const T>(problem, operands.value), dim, wide_grad_output, grad_scores);
      dot_tokens(strip, heads, keys, dim, wide_query, weights);
      softmax(weights, keys_of_row);
      softmax_backward(weights, grad_scores, keys_of_row);
      add_tokens(strip, heads, keys, dim, grad_scores, wide_grad_query);
      write_tokens<streamed>(strip, heads, strip.keys_of<T>(problem, operands.grad_key), dim, wide_query, grad_scores);
      write_tokens<streamed>(strip, heads, strip.keys_of<T>(problem, operands.grad_value), dim, wide_grad_output,
                             weights);
      for (int64_t row = 0; row < rows; ++row) {
        write_scaled<false>(wide_grad_query(row), scale, dim, query_row(grad_queries, heads, row));
      }
    }
    if constexpr (streamed) stream_fence();
    return true;
  });
}

/// Gradients of keys and values are written once and are large: past the caches where their rows are aligned.
template <class T>
bool backward(const AttentionProblem& problem, const cpu::BackwardOperands& operands, const cpu::ParallelLoop& loop) {
  constexpr uintptr_t alignment = sizeof(T) * kLanes < 32 ? sizeof(T) * kLanes : 32;
  const bool aligned = problem.head_dim % kLanes == 0 &&
                       reinterpret_cast<uintptr_t>(operands.grad_key.data) % alignment == 0 &&
                       reinterpret_cast<uintptr_t>(operands.grad_value.data) % alignment == 0;
  return aligned ? backward_with<true, T>(problem, operands, loop) : backward_with<false, T>(problem, operands, loop);
}

/// The kernels of this instruction set, in the order of cpu::Element.
constexpr cpu::AttentionKernels attention_kernels(const char* instruction_set) {
  return {instruction_set,
          {forward<float>, forward<double>, forward<BFloat16>, forward<Float16>},
          {backward<float>, backward<double>, backward<BFloat16>, backward<Float16>},
          {normalized_forward<float>, normalized_forward<double>, normalized_forward<BFloat16>,
           normalized_forward<Float16>},
          {normalized_backward<float>, normalized_backward<double>, normalized_backward<BFloat16>,
           normalized_backward<Float16>}};
}

}  // namespace llava_st::LLAVA_ST_ISA
