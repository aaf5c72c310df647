// Region attention over normalised keys and values that all heads share, on a CPU. Compiled once per instruction set.
//
// Regions do not overlap: every gradient has one writer, and the result does not depend on the number of threads. With
// n(x) the normalised row, s the scores, p the weights, g the gradient of a head's result, E channels:
//   grad_weight_hj = g_h . n(v_j),  grad_score_hj = p_hj (grad_weight_hj - sum over j of p grad_weight),
//   grad_query_h = sum over j of grad_score_hj n(k_j),
//   grad_key_j = rstd_j (sum over h of grad_score_hj (u_h - mean u_h) - n(k_j) (sum over h of grad_score_hj s_hj) / E),
// and grad_value_j likewise, from p, g and grad_weight. The rows u_h of the heads are centred first, forward too:
// normalised rows have no mean but for rounding, which a large mean of a query would multiply.
#pragma once

#include <math.h>

#include "attention_problem.h"
#include "scratch.h"
#include "softmax.h"
#include "strip.h"

namespace llava_st::LLAVA_ST_ISA {

/// What is done to heads at a time: as many sums as registers hold.
constexpr int kHeadsAtOnce = 8;
/// Keys whose rows stay in the cache while all heads are summed over them.
constexpr int64_t kKeysAtOnce = 16;

/// The rows of a region's keys, or values, and what normalises them: n(row) = (row - mean) * rstd.
template <class T>
struct NormalizedRows {
  using S = Scalar<T>;
  Tokens<const T> tokens;
  Extent size;
  int64_t count, dim;
  S *means, *rstds;

  LLAVA_ST_INLINE int64_t offset(const TokenStrides& strides, int64_t j) const {
    return strides.offset({j / (size.h * size.w), j / size.w % size.h, j % size.w});
  }
  LLAVA_ST_INLINE const T* row(int64_t j) const { return tokens.first + offset(tokens.strides, j); }

  /// Calls `visit(d, vector)` for the row less its mean, with zeros behind its end.
  template <class Visit>
  LLAVA_ST_INLINE void for_centered(int64_t j, Visit visit) const {
    const T* const x = row(j);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) visit(d, load(x + d) - means[j]);
    if (d < dim) {
      S padded[kLanes] = {};
      store_first(padded, load_first(x + d, dim - d) - means[j], dim - d);
      visit(d, load(padded));
    }
  }

  LLAVA_ST_INLINE void measure(double eps) {
    for (int64_t j = 0; j < count; ++j) {
      means[j] = 0;
      Vector<T> sum = {};
      for_centered(j, [&](int64_t, Vector<T> x) { sum += x; });
      means[j] = sum_of_lanes(sum) / static_cast<S>(dim);
      // What is left of the mean after rounding, which in a long row far from zero is much of a deviation.
      Vector<T> rest = {}, squares = {};
      for_centered(j, [&](int64_t, Vector<T> x) {
        rest += x;
        squares += x * x;
      });
      const double correction = static_cast<double>(sum_of_lanes(rest)) / static_cast<double>(dim);
      const double variance =
          static_cast<double>(sum_of_lanes(squares)) / static_cast<double>(dim) - correction * correction;
      means[j] += static_cast<S>(correction);
      rstds[j] = static_cast<S>(1 / sqrt(variance + eps));  // sqrt(float) is inline and of the standard library
    }
  }

  /// products.row(h)[j] = wide row h . n(row j), for `heads` wide rows that are `stride` apart.
  LLAVA_ST_INLINE void dot(const S* wide, int64_t stride, int64_t heads, const ScoreRows<S>& products) const {
    for (int64_t j = 0; j < count; ++j) {
      int64_t h = 0;
      for (; h + kHeadsAtOnce <= heads; h += kHeadsAtOnce) dot_heads<kHeadsAtOnce>(wide, stride, h, j, products);
      for (; h < heads; ++h) dot_heads<1>(wide, stride, h, j, products);
    }
  }

  /// wide row h += sum over j of weights.row(h)[j] * n(row j).
  LLAVA_ST_INLINE void pool(const ScoreRows<S>& weights, int64_t heads, S* wide, int64_t stride) const {
    for (int64_t begin = 0; begin < count; begin += kKeysAtOnce) {
      const int64_t end = smaller(begin + kKeysAtOnce, count);
      int64_t h = 0;
      for (; h + kHeadsAtOnce <= heads; h += kHeadsAtOnce)
        pool_heads<kHeadsAtOnce>(weights, h, begin, end, wide, stride);
      for (; h < heads; ++h) pool_heads<1>(weights, h, begin, end, wide, stride);
    }
  }

  /// The gradient of row j: rstd_j (sum over h of factors.row(h)[j] * centred wide row h - n(row j) * along).
  LLAVA_ST_INLINE void write_gradient(int64_t j, const ScoreRows<S>& factors, const S* wide, int64_t stride, S along,
                                      T* to) const {
    const S rstd = rstds[j];
    for_centered(j, [&](int64_t d, Vector<T> x) {
      Vector<T> sum = x * (-along * rstd);
      for (int64_t h = 0; h < factors.rows; ++h) sum += load(wide + h * stride + d) * factors.row(h)[j];
      if (d + kLanes <= dim) {
        store(to + d, sum * rstd);
      } else {
        store_first(to + d, sum * rstd, dim - d);
      }
    });
  }

 private:
  template <int heads>
  LLAVA_ST_INLINE void dot_heads(const S* wide, int64_t stride, int64_t h, int64_t j,
                                 const ScoreRows<S>& products) const {
    Vector<T> sums[heads] = {};
    for_centered(j, [&](int64_t d, Vector<T> x) {
      for (int i = 0; i < heads; ++i) sums[i] += x * load(wide + (h + i) * stride + d);
    });
    for (int i = 0; i < heads; ++i) products.row(h + i)[j] = sum_of_lanes(sums[i]) * rstds[j];
  }

  template <int heads>
  LLAVA_ST_INLINE void pool_heads(const ScoreRows<S>& weights, int64_t h, int64_t begin, int64_t end, S* wide,
                                  int64_t stride) const {
    S scaled[heads][kKeysAtOnce];
    const T* rows[kKeysAtOnce];
    for (int64_t j = begin; j < end; ++j) {
      rows[j - begin] = row(j);
      for (int i = 0; i < heads; ++i) scaled[i][j - begin] = weights.row(h + i)[j] * rstds[j];
    }
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vector<T> sums[heads];
      for (int i = 0; i < heads; ++i) sums[i] = load(wide + (h + i) * stride + d);
      for (int64_t j = 0; j < end - begin; ++j) {
        const T* const at = rows[j] + d;
        const Vector<T> x = (d + kLanes <= dim ? load(at) : load_first(at, dim - d)) - means[begin + j];
        for (int i = 0; i < heads; ++i) sums[i] += x * scaled[i][j];
      }
      for (int i = 0; i < heads; ++i) store(wide + (h + i) * stride + d, sums[i]);
    }
  }
};

/// A region: its strip of one, and how its memory is divided up.
template <class T>
struct NormalizedRegion {
  using S = Scalar<T>;
  const NormalizedProblem& problem;
  Strip strip;
  int64_t heads, dim, stride;  // of wide rows

  LLAVA_ST_INLINE NormalizedRegion(const NormalizedProblem& problem, int64_t query)
      : problem(problem),
        strip(problem.attention, query, 1),
        heads(problem.attention.heads),
        dim(problem.attention.head_dim),
        stride(ceil_div(dim, kLanes) * kLanes) {}

  /// Keys or values, measured; `statistics` has room for two numbers per token.
  LLAVA_ST_INLINE NormalizedRows<T> rows(const Operand& operand, S* statistics) const {
    const int64_t count = strip.tokens_of(0);
    const Extent size = {strip.region.t, strip.region.h, strip.width_of(0)};
    NormalizedRows<T> rows = {
        strip.keys_of<const T>(problem.attention, operand), size, count, dim, statistics, statistics + count};
    rows.measure(problem.eps);
    return rows;
  }

  /// The heads' rows of the query side, widened and centred.
  LLAVA_ST_INLINE void widen_heads(const Operand& operand, S* wide) const {
    const auto tokens = strip.queries_of<const T>(problem.attention, operand);
    for (int64_t h = 0; h < heads; ++h) {
      S* const row = wide + h * stride;
      widen(tokens.first + h * tokens.strides.head, S{1}, dim, row);
      Vector<T> sum = {};
      for (int64_t d = 0; d < stride; d += kLanes) sum += load(row + d);
      const S mean = sum_of_lanes(sum) / static_cast<S>(dim);
      for (int64_t d = 0; d < dim; ++d) row[d] -= mean;
    }
  }

  LLAVA_ST_INLINE void write_heads(const S* wide, const Operand& operand) const {
    const auto tokens = strip.queries_of<T>(problem.attention, operand);
    for (int64_t h = 0; h < heads; ++h) {
      write_scaled<false>(wide + h * stride, S{1}, dim, tokens.first + h * tokens.strides.head);
    }
  }
};

template <class T>
bool normalized_forward(const NormalizedProblem& problem, const cpu::ForwardOperands& operands,
                        const cpu::ParallelLoop& loop) {
  using S = Scalar<T>;
  const int64_t heads = problem.attention.heads, largest = problem.attention.largest_region;
  const int64_t scores = ScoreRows<S>::reserve(heads, largest);
  return cpu::run_parallel(loop, problem.attention.queries, [&](int64_t begin, int64_t end) {
    Scratch<S> scratch(scores + 2 * largest, 2 * heads, problem.attention.head_dim);
    if (scratch.failed()) return false;
    S* const statistics = scratch.weights() + scores;
    S *const wide = scratch.row(0), *const pooled = scratch.row(heads);
    for (int64_t query = begin; query < end; ++query) {
      const NormalizedRegion<T> region(problem, query);
      const ScoreRows<S> weights = {scratch.weights(), heads, region.strip.stride()};
      region.widen_heads(operands.query, wide);
      const auto keys = region.rows(operands.key, statistics);
      keys.dot(wide, region.stride, heads, weights);
      softmax(weights, [&](int64_t) { return keys.count; });
      memset(pooled, 0, heads * region.stride * sizeof(S));
      region.rows(operands.value, statistics).pool(weights, heads, pooled, region.stride);
      region.write_heads(pooled, operands.output);
    }
    return true;
  });
}

/// Gradients of a region's keys, or values.
template <class T, class S>
LLAVA_ST_INLINE void write_gradients(const NormalizedRegion<T>& region, const NormalizedRows<T>& rows,
                                     const ScoreRows<S>& factors, const ScoreRows<S>& products, const S* wide,
                                     const Operand& to) {
  const auto grads = region.strip.template keys_of<T>(region.problem.attention, to);
  for (int64_t j = 0; j < rows.count; ++j) {
    S along = 0;
    for (int64_t h = 0; h < region.heads; ++h) along += factors.row(h)[j] * products.row(h)[j];
    rows.write_gradient(j, factors, wide, region.stride, along / static_cast<S>(region.dim),
                        grads.first + rows.offset(grads.strides, j));
  }
}

template <class T>
bool normalized_backward(const NormalizedProblem& problem, const cpu::BackwardOperands& operands,
                         const cpu::ParallelLoop& loop) {
  using S = Scalar<T>;
  const int64_t heads = problem.attention.heads, largest = problem.attention.largest_region;
  const int64_t scores = ScoreRows<S>::reserve(heads, largest);
  return cpu::run_parallel(loop, problem.attention.queries, [&](int64_t begin, int64_t end) {
    Scratch<S> scratch(4 * scores + 4 * largest, 3 * heads, problem.attention.head_dim);
    if (scratch.failed()) return false;
    S* const statistics = scratch.weights() + 4 * scores;
    S *const query = scratch.row(0), *const grad = scratch.row(heads), *const grad_query = scratch.row(2 * heads);
    for (int64_t unit = begin; unit < end; ++unit) {
      const NormalizedRegion<T> region(problem, unit);
      const auto matrix = [&](int64_t i) {
        return ScoreRows<S>{scratch.weights() + i * scores, heads, region.strip.stride()};
      };
      const auto products = matrix(0), weights = matrix(1), grad_weights = matrix(2), grad_scores = matrix(3);
      region.widen_heads(operands.query, query);
      region.widen_heads(operands.grad_output, grad);
      const auto keys = region.rows(operands.key, statistics);
      const auto values = region.rows(operands.value, statistics + 2 * largest);
      const auto length = [&](int64_t) { return keys.count; };
      const size_t bytes = scores * sizeof(S);
      keys.dot(query, region.stride, heads, products);
      values.dot(grad, region.stride, heads, grad_weights);
      memcpy(weights.scores, products.scores, bytes);
      softmax(weights, length);
      memcpy(grad_scores.scores, grad_weights.scores, bytes);
      softmax_backward(weights, grad_scores, length);

      memset(grad_query, 0, heads * region.stride * sizeof(S));
      keys.pool(grad_scores, heads, grad_query, region.stride);
      region.write_heads(grad_query, operands.grad_query);
      write_gradients(region, keys, grad_scores, products, query, operands.grad_key);
      write_gradients(region, values, weights, grad_weights, grad, operands.grad_value);
    }
    return true;
  });
}

}  // namespace llava_st::LLAVA_ST_ISA
