// Point-to-region attention from its definition, in plain loops, with a bound on how far a right kernel may be off.
//
// Let u be the rounding of the type that the kernel computes in. To first order, with sums of absolute values for sums:
//
// - An inner product of `dim` products is off by `depth u` times its terms, where depth counts the roundings on the way
//   of one product: dim / 8 in a lane at most (fewer where several vectors are summed), then about a dozen.
// - So is a score, of terms no more than A; less the largest, it is rounded once more: off by x = (depth + 2) u A.
// - Its exponential is off by the fraction x, and 8 u of its own; the sum of n of those by as much and n u. The weights
//   p = exp / sum are off by the fraction r = 2 x + (n + 20) u. Below, r has another (n + depth) u in it, for sums over
//   n weights and for the inner products dp = grad_output . value.
// - The output and the gradients of the values are sums of terms of weights: off by r times those terms.
// - ds = p (dp - sum of p dp), and the inner products are no more than G: off by 4 r p G. From there, the gradients of
//   the keys are one product and those of the queries one sum away: 6 r times their terms, with p G in the place of ds.
//
// Second order terms are covered by rounding 1 and 6 up to 2 and 8. The loops themselves compute in long double, so
// that the kernels in double have something better than themselves to be compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace llava_st::tests {

using Real = long double;
using Row = std::vector<Real>;

/// `[rows, heads, dim]` numbers, and how far from them a kernel's may be before they are rounded to their type.
struct Expected {
  std::vector<Real> value, error;

  explicit Expected(size_t size) : value(size), error(size) {}
  void add(size_t at, Real term, Real off) {
    value[at] += term;
    error[at] += off;
  }
};

struct Inputs {
  std::vector<double> query, key, value, grad_output;
  std::vector<double> bias;  // empty where there is none
};

struct Results {
  Expected output, grad_query, grad_key, grad_value, grad_bias;
};

/// One region and head: `query` and `all_tokens` are the numbers of their rows.
inline void attend_region(const std::vector<size_t>& all_tokens, size_t query, size_t dim, size_t value_dim, Real scale,
                          double u, const Inputs& in, Results& out) {
  std::vector<size_t> tokens;  // that are not masked
  for (const size_t token : all_tokens) {
    if (in.bias.empty() || in.bias[token] > -INFINITY) tokens.push_back(token);
  }
  const size_t n = tokens.size();
  const double *const q = &in.query[query * dim], *const g = &in.grad_output[query * value_dim];

  Row p(n), dp(n);
  Real largest = -INFINITY, sum = 0, mean = 0, score_terms = 0, dp_terms = 0;  // the last two: A and G
  for (size_t j = 0; j < n; ++j) {
    const double *const k = &in.key[tokens[j] * dim], *const v = &in.value[tokens[j] * value_dim];
    const Real bias = in.bias.empty() ? 0 : in.bias[tokens[j]];
    Real score = bias, other = 0, terms = std::fabs(bias), other_terms = 0;
    for (size_t d = 0; d < dim; ++d) {
      const Real product = scale * q[d] * k[d];
      score += product;
      terms += std::fabs(product);
    }
    for (size_t d = 0; d < value_dim; ++d) {
      const Real product = Real(g[d]) * v[d];
      other += product;
      other_terms += std::fabs(product);
    }
    p[j] = score;
    dp[j] = other;
    largest = std::max(largest, score);
    score_terms = std::max(score_terms, terms);
    dp_terms = std::max(dp_terms, other_terms);
  }
  for (Real& x : p) sum += x = std::exp(x - largest);
  for (size_t j = 0; j < n; ++j) mean += (p[j] /= sum) * dp[j];

  const Real depth = Real(std::max(dim, value_dim) / 8 + 13);
  const Real r = (2 * (depth + 2) * score_terms + 2 * Real(n) + depth + 20) * u;
  for (size_t j = 0; j < n; ++j) {
    const double *const k = &in.key[tokens[j] * dim], *const v = &in.value[tokens[j] * value_dim];
    const Real weight = p[j], weight_off = 2 * r * weight;
    const Real ds = weight * (dp[j] - mean), ds_off = 8 * r * weight * dp_terms;
    for (size_t d = 0; d < dim; ++d) {
      out.grad_query.add(query * dim + d, ds * scale * k[d], ds_off * std::fabs(scale * k[d]));
      out.grad_key.add(tokens[j] * dim + d, ds * scale * q[d], ds_off * std::fabs(scale * q[d]));
    }
    for (size_t d = 0; d < value_dim; ++d) {
      out.output.add(query * value_dim + d, weight * v[d], weight_off * std::fabs(v[d]));
      out.grad_value.add(tokens[j] * value_dim + d, weight * g[d], weight_off * std::fabs(g[d]));
    }
    if (!in.bias.empty()) out.grad_bias.add(tokens[j], ds, ds_off);
  }
}

/// All regions: `regions[query]` holds the numbers of the tokens that belong to that query.
inline Results attend(const std::vector<std::vector<int64_t>>& regions, int64_t heads, int64_t dim, int64_t value_dim,
                      double scale, double u, const Inputs& in) {
  Results out = {Expected(in.grad_output.size()), Expected(in.query.size()), Expected(in.key.size()),
                 Expected(in.value.size()), Expected(in.bias.size())};
  const auto row = [&](int64_t number, int64_t head) { return static_cast<size_t>(number * heads + head); };
  for (size_t query = 0; query < regions.size(); ++query) {
    for (int64_t head = 0; head < heads; ++head) {
      std::vector<size_t> tokens;
      for (const int64_t token : regions[query]) tokens.push_back(row(token, head));
      attend_region(tokens, row(static_cast<int64_t>(query), head), static_cast<size_t>(dim),
                    static_cast<size_t>(value_dim), scale, u, in, out);
    }
  }
  return out;
}

}  // namespace llava_st::tests
