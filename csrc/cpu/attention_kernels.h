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

/// Where there is no bias no key is masked.
struct NoBias {
  LLAVA_ST_INLINE bool masks(int64_t, int64_t) const { return false; }
};

/// What is added to the score of each row and token. A token with -inf is masked: whatever its key and value hold, it
/// takes no part.
template <class S>
struct Biases {
  ScoreRows<S> rows;

  LLAVA_ST_INLINE bool masks(int64_t row, int64_t j) const { return rows.row(row)[j] == -INFINITY; }

  template <class T>
  LLAVA_ST_INLINE void read(const Strip& strip, Heads heads, const Tokens<const T>& tokens) const {
    strip.for_tokens(tokens.strides, [&](int64_t r, int64_t j, int64_t offset) {
      for (int64_t h = 0; h < heads.count; ++h) {
        const T* const bias = tokens.first + offset + (heads.first + h) * tokens.strides.head;
        rows.row(r * heads.count + h)[j] = load_first(bias, 1)[0];
      }
    });
  }

  LLAVA_ST_INLINE void add_to(const ScoreRows<S>& scores) const {
    for (int64_t i = 0; i < rows.rows * rows.stride; i += kLanes) {
      store(scores.scores + i, load(scores.scores + i) + load(rows.scores + i));
    }
  }

  /// The gradients of the biases are those of the scores, but for masked keys.
  template <class T>
  LLAVA_ST_INLINE void write_gradients(const Strip& strip, Heads heads, const ScoreRows<S>& grad_scores,
                                       const Tokens<T>& tokens) const {
    strip.for_tokens(tokens.strides, [&](int64_t r, int64_t j, int64_t offset) {
      for (int64_t h = 0; h < heads.count; ++h) {
        const int64_t row = r * heads.count + h;
        const S grad = masks(row, j) ? 0 : grad_scores.row(row)[j];
        store_first(tokens.first + offset + (heads.first + h) * tokens.strides.head, Vector<T>{} + grad, 1);
      }
    });
  }
};

/// products.row(row)[j] = wide_row(row) . token j of the row's region and head; 0 where that is masked.
template <class T, class WideRow, class Bias>
LLAVA_ST_INLINE void dot_tokens(const Strip& strip, Heads heads, const Tokens<const T>& tokens, int64_t dim,
                                WideRow wide_row, const Bias& bias, const ScoreRows<Scalar<T>>& products) {
  strip.for_tokens(tokens.strides, [&](int64_t r, int64_t j, int64_t offset) {
    for (int64_t h = 0; h < heads.count; ++h) {
      const T* const token = tokens.first + offset + (heads.first + h) * tokens.strides.head;
      const int64_t row = r * heads.count + h;
      prefetch_after(token, dim * sizeof(T));
      products.row(row)[j] = bias.masks(row, j) ? 0 : dot(wide_row(row), token, dim);
    }
  });
}

/// wide_sum(row) += sum over j of weights.row(row)[j] * token j of the row's region and head.
template <class T, class WideSum, class Bias>
LLAVA_ST_INLINE void add_tokens(const Strip& strip, Heads heads, const Tokens<const T>& tokens, int64_t dim,
                                const ScoreRows<Scalar<T>>& weights, const Bias& bias, WideSum wide_sum) {
  strip.for_tokens(tokens.strides, [&](int64_t r, int64_t j, int64_t offset) {
    for (int64_t h = 0; h < heads.count; ++h) {
      const T* const token = tokens.first + offset + (heads.first + h) * tokens.strides.head;
      const int64_t row = r * heads.count + h;
      prefetch_after(token, dim * sizeof(T));
      if (!bias.masks(row, j)) add_scaled(token, weights.row(row)[j], dim, wide_sum(row));
    }
  });
}

/// Token j of the row's region and head = factors.row(row)[j] * wide_row(row); zeros, of which there is a wide row,
/// where it is masked.
template <bool streamed, class T, class WideRow, class Bias>
LLAVA_ST_INLINE void write_tokens(const Strip& strip, Heads heads, const Tokens<T>& tokens, int64_t dim,
                                  WideRow wide_row, const Scalar<T>* zeros, const Bias& bias,
                                  const ScoreRows<Scalar<T>>& factors) {
  strip.for_tokens(tokens.strides, [&](int64_t r, int64_t j, int64_t offset) {
    for (int64_t h = 0; h < heads.count; ++h) {
      const int64_t row = r * heads.count + h;
      const bool masked = bias.masks(row, j);
      write_scaled<streamed>(masked ? zeros : wide_row(row), masked ? 0 : factors.row(row)[j], dim,
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

/// The biases of a strip, read into `memory`.
template <bool biased, class T>
LLAVA_ST_INLINE auto biases_of(const AttentionProblem& problem, const Strip& strip, Heads heads, const Operand& operand,
                               Scalar<T>* memory) {
  if constexpr (biased) {
    const Biases<Scalar<T>> biases = {{memory, strip.count * heads.count, strip.stride()}};
    biases.read(strip, heads, strip.keys_of<const T>(problem, operand));
    return biases;
  } else {
    return NoBias{};
  }
}

LLAVA_ST_INLINE int64_t wider(int64_t a, int64_t b) { return a > b ? a : b; }

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

template <bool biased, class T>
bool forward_with(const AttentionProblem& problem, const cpu::ForwardOperands& operands,
                  const cpu::ParallelLoop& loop) {
  using S = Scalar<T>;
  const int64_t dim = problem.head_dim, value_dim = problem.value_dim;
  const S scale = static_cast<S>(problem.scale);
  const Cut cut(problem, loop.threads, problem.heads * (dim + value_dim) * sizeof(S));

  return cpu::run_parallel(loop, cut.units(problem), [&](int64_t begin, int64_t end) {
    const int64_t most_rows = cut.regions * cut.most_heads(problem);
    const int64_t most_scores = ScoreRows<S>::reserve(most_rows, problem.largest_region);
    Scratch<S> scratch((biased ? 2 : 1) * most_scores, 2 * most_rows, wider(dim, value_dim));
    if (scratch.failed()) return false;

    for (int64_t unit = begin; unit < end;) {
      const Strip strip(problem, unit / cut.groups, smaller(cut.regions, end - unit));
      const Heads heads = cut.heads_of(problem, unit);
      unit += strip.count;
      const int64_t rows = strip.count * heads.count;
      const ScoreRows<S> weights = {scratch.weights(), rows, strip.stride()};
      const auto bias = biases_of<biased, T>(problem, strip, heads, operands.bias, scratch.weights() + most_scores);
      const auto keys_of_row = [&](int64_t row) { return strip.tokens_of(row / heads.count); };
      const auto queries = strip.queries_of<const T>(problem, operands.query);
      const auto outputs = strip.queries_of<T>(problem, operands.output);
      const auto wide_query = [&](int64_t row) { return scratch.row(row); };
      const auto wide_output = [&](int64_t row) { return scratch.row(rows + row); };

      for (int64_t row = 0; row < rows; ++row) {
        widen(query_row(queries, heads, row), scale, dim, wide_query(row));
        scratch.clear_row(rows + row);
      }
      dot_tokens(strip, heads, strip.keys_of<const T>(problem, operands.key), dim, wide_query, bias, weights);
      if constexpr (biased) bias.add_to(weights);
      softmax<biased>(weights, keys_of_row);
      add_tokens(strip, heads, strip.keys_of<const T>(problem, operands.value), value_dim, weights, bias, wide_output);
      for (int64_t row = 0; row < rows; ++row) {
        write_scaled<false>(wide_output(row), static_cast<S>(1), value_dim, query_row(outputs, heads, row));
      }
    }
    return true;
  });
}

template <class T>
bool forward(const AttentionProblem& problem, const cpu::ForwardOperands& operands, const cpu::ParallelLoop& loop) {
  return operands.bias.data != nullptr ? forward_with<true, T>(problem, operands, loop)
                                       : forward_with<false, T>(problem, operands, loop);
}

template <bool streamed, bool biased, class T>
bool backward_with(const AttentionProblem& problem, const cpu::BackwardOperands& operands,
                   const cpu::ParallelLoop& loop) {
  using S = Scalar<T>;
  const int64_t dim = problem.head_dim, value_dim = problem.value_dim;
  const S scale = static_cast<S>(problem.scale);
  const Cut cut(problem, loop.threads, problem.heads * (2 * dim + value_dim) * sizeof(S));

  return cpu::run_parallel(loop, cut.units(problem), [&](int64_t begin, int64_t end) {
    const int64_t most_rows = cut.regions * cut.most_heads(problem);
    const int64_t most_scores = ScoreRows<S>::reserve(most_rows, problem.largest_region);
    Scratch<S> scratch((biased ? 3 : 2) * most_scores, 3 * most_rows + biased, wider(dim, value_dim));
    if (scratch.failed()) return false;
    if constexpr (biased) scratch.clear_row(3 * most_rows);
    const S* const zeros = scratch.row(3 * most_rows);

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
      const auto bias = biases_of<biased, T>(problem, strip, heads, operands.bias, scratch.weights() + 2 * most_scores);
      const auto keys_of_row = [&](int64_t row) { return strip.tokens_of(row / heads.count); };

      for (int64_t row = 0; row < rows; ++row) {
        widen(query_row(queries, heads, row), scale, dim, wide_query(row));
        widen(query_row(grad_outputs, heads, row), static_cast<S>(1), value_dim, wide_grad_output(row));
        scratch.clear_row(2 * rows + row);
      }
      // Values before keys: the keys are wanted a second time, soon.
      dot_tokens(strip, heads, strip.keys_of<const T>(problem, operands.value), value_dim, wide_grad_output, bias,
                 grad_scores);
      dot_tokens(strip, heads, keys, dim, wide_query, bias, weights);
      if constexpr (biased) bias.add_to(weights);
      softmax<biased>(weights, keys_of_row);
      softmax_backward(weights, grad_scores, keys_of_row);
      add_tokens(strip, heads, keys, dim, grad_scores, bias, wide_grad_query);
      write_tokens<streamed>(strip, heads, strip.keys_of<T>(problem, operands.grad_key), dim, wide_query, zeros, bias,
                             grad_scores);
      write_tokens<streamed>(strip, heads, strip.keys_of<T>(problem, operands.grad_value), value_dim, wide_grad_output,
                             zeros, bias, weights);
      if constexpr (biased) {
        bias.write_gradients(strip, heads, grad_scores, strip.keys_of<T>(problem, operands.grad_bias));
      }
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
  const bool aligned = problem.head_dim % kLanes == 0 && problem.value_dim % kLanes == 0 &&
                       reinterpret_cast<uintptr_t>(operands.grad_key.data) % alignment == 0 &&
                       reinterpret_cast<uintptr_t>(operands.grad_value.data) % alignment == 0;
  const auto run = aligned
                       ? operands.bias.data != nullptr ? backward_with<true, true, T> : backward_with<true, false, T>
                   : operands.bias.data != nullptr ? backward_with<false, true, T>
                                                   : backward_with<false, false, T>;
  return run(problem, operands, loop);
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
