// Attention over normalised keys and values, on every instruction set and element type, forward and backward, in
// several threads, against loops from the definition.
//
// Kernels may be off as much as reference.h tells of attention, of rows that are off themselves. Let u be the rounding
// of the type that the kernel computes in, depth the roundings on the way of one number into a sum over a row:
//
// - The mean of a row is off by m = depth u times its largest number, and so is what is less the mean.
// - The sum of the squares of that is off by the fraction depth u, and by m^2 for each (what is off by m has no mean);
//   rstd by the fraction r = depth u + m^2 rstd^2.
// - The normalised row n is off by m rstd + r |n|. The rows of the query side are centred: off by m.
//
// The kernels' sums follow, each term off by what its factors are off and by `depth u` or the length of the sum.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention_runs.h"
#include "reference.h"

namespace llava_st::tests {
namespace {

using cpu::AttentionKernels;
using cpu::NormalizedProblem;
using cpu::ParallelLoop;

struct NormalizedCase {
  Case shape;  // `scale`: of the queries
  double eps = 1e-5;
  double mean = 0;        // of the keys and values
  double query_mean = 0;  // and of the query side
};

/// A number and how far off it may be.
struct Off {
  Real value = 0, off = 0;

  void add(Off term) {
    value += term.value;
    off += term.off;
  }
};
Off operator*(Off a, Off b) {
  return {a.value * b.value, std::fabs(a.value) * b.off + a.off * std::fabs(b.value) + a.off * b.off};
}
/// As of a sum of so many roundings.
Off rounded(Off a, Real roundings) { return {a.value, a.off + roundings * std::fabs(a.value)}; }

using OffRow = std::vector<Off>;

/// A row normalised, or only centred.
struct NormalizedRow {
  OffRow elements;
  Off rstd;
};

NormalizedRow normalize(const double* row, size_t dim, double eps, bool only_centered, Real depth) {
  Real mean = 0, square = 0, largest = 0;
  for (size_t d = 0; d < dim; ++d) {
    mean += row[d] / static_cast<Real>(dim);
    largest = std::max(largest, std::fabs(Real(row[d])));
  }
  for (size_t d = 0; d < dim; ++d) square += (row[d] - mean) * (row[d] - mean) / static_cast<Real>(dim);
  const Real off = depth * largest;
  NormalizedRow result;
  result.rstd = {1, 0};
  if (!only_centered) {
    const Real rstd = 1 / std::sqrt(square + eps);
    result.rstd = {rstd, rstd * (depth + off * off * rstd * rstd)};
  }
  for (size_t d = 0; d < dim; ++d) result.elements.push_back(Off{row[d] - mean, off} * result.rstd);
  return result;
}

Off inner(const OffRow& a, const OffRow& b, Real depth) {
  Off sum;
  for (size_t d = 0; d < a.size(); ++d) sum.add(rounded(a[d] * b[d], depth));
  return sum;
}

/// All of one region. `queries` are where the rows of its heads begin in the query side, `tokens` those of its keys.
void attend_normalized(const std::vector<size_t>& tokens, const std::vector<size_t>& queries, size_t dim, double eps,
                       double unit, const Inputs& in, Results& out) {
  const size_t keys = tokens.size(), heads = queries.size();
  const Real u = unit, depth = Real(dim / 8 + 12) * u, many = Real(keys + 12) * u, dims = static_cast<Real>(dim);
  std::vector<NormalizedRow> k, v, q, g;
  for (const size_t token : tokens) {
    k.push_back(normalize(&in.key[token], dim, eps, false, depth));
    v.push_back(normalize(&in.value[token], dim, eps, false, depth));
  }
  // Rows of p and ds as the kernels have them: [head][key].
  std::vector<OffRow> scores(heads), weights(heads), grad_weights(heads), grad_scores(heads);
  for (size_t h = 0; h < heads; ++h) {
    q.push_back(normalize(&in.query[queries[h]], dim, eps, true, depth));
    g.push_back(normalize(&in.grad_output[queries[h]], dim, eps, true, depth));
    Real largest = -INFINITY, sum = 0, off = 0;
    for (size_t j = 0; j < keys; ++j) {
      scores[h].push_back(inner(q[h].elements, k[j].elements, depth));
      grad_weights[h].push_back(inner(g[h].elements, v[j].elements, depth));
      largest = std::max(largest, scores[h][j].value);
    }
    for (const Off& score : scores[h]) {
      sum += std::exp(score.value - largest);
      off = std::max(off, score.off + 2 * u * (std::fabs(score.value) + std::fabs(largest)));
    }
    Off mean;
    for (size_t j = 0; j < keys; ++j) {
      const Real weight = std::exp(scores[h][j].value - largest) / sum;
      weights[h].push_back({weight, weight * (2 * off + many + 8 * u)});
      mean.add(rounded(weights[h][j] * grad_weights[h][j], many));
    }
    for (size_t j = 0; j < keys; ++j) {
      const Off difference = {grad_weights[h][j].value - mean.value, grad_weights[h][j].off + mean.off};
      grad_scores[h].push_back(rounded(weights[h][j] * difference, 4 * u));
    }
  }

  const auto write = [](Expected& to, size_t at, Off number) { to.add(at, number.value, 2 * number.off); };
  for (size_t h = 0; h < heads; ++h) {
    for (size_t d = 0; d < dim; ++d) {
      Off output, grad_query;
      for (size_t j = 0; j < keys; ++j) {
        output.add(rounded(weights[h][j] * v[j].elements[d], many));
        grad_query.add(rounded(grad_scores[h][j] * k[j].elements[d], many));
      }
      write(out.output, queries[h] + d, output);
      write(out.grad_query, queries[h] + d, grad_query);
    }
  }
  const auto write_gradient = [&](const NormalizedRow& row, const std::vector<OffRow>& factors,
                                  const std::vector<OffRow>& products, const std::vector<NormalizedRow>& wide, size_t j,
                                  Expected& to) {
    const Real sums = Real(heads + 12) * u;
    Off along;
    for (size_t h = 0; h < heads; ++h) along.add(rounded(factors[h][j] * products[h][j], sums));
    for (size_t d = 0; d < dim; ++d) {
      Off sum = rounded(row.elements[d] * along * Off{-1 / dims, u / dims}, sums);
      for (size_t h = 0; h < heads; ++h) sum.add(rounded(factors[h][j] * wide[h].elements[d], sums));
      write(to, tokens[j] + d, sum * row.rstd);
    }
  };
  for (size_t j = 0; j < keys; ++j) {
    write_gradient(k[j], grad_scores, scores, q, j, out.grad_key);
    write_gradient(v[j], weights, grad_weights, g, j, out.grad_value);
  }
}

/// Random numbers that are numbers of type T, so that only what is computed from them is rounded.
template <class T>
Inputs random_inputs(const NormalizedCase& a, const Layout& layout) {
  std::mt19937 generator(1);
  std::uniform_real_distribution<double> uniform(-2, 2);
  const auto numbers = [&](int64_t rows, double factor, double mean) {
    std::vector<double> result(static_cast<size_t>(rows * a.shape.dim));
    for (double& x : result) x = static_cast<double>(static_cast<T>(factor * uniform(generator) + mean));
    return result;
  };
  const PackedOffset rows = layout.offsets.back();
  const int64_t queries = rows.query * a.shape.heads;
  return {numbers(queries, scale_of(a.shape), a.query_mean), numbers(rows.key, 1, a.mean), numbers(rows.key, 1, a.mean),
          numbers(queries, 1, a.query_mean)};
}

template <class T>
Results expected_of(const NormalizedCase& a, const Layout& layout, const Inputs& in) {
  Results out = {Expected(in.query.size()), Expected(in.query.size()), Expected(in.key.size()), Expected(in.key.size()),
                 Expected(0)};
  const auto dim = static_cast<size_t>(a.shape.dim), heads = static_cast<size_t>(a.shape.heads);
  for (size_t query = 0; query < layout.regions.size(); ++query) {
    std::vector<size_t> tokens, queries;
    for (const int64_t token : layout.regions[query]) tokens.push_back(static_cast<size_t>(token) * dim);
    for (size_t h = 0; h < heads; ++h) queries.push_back((query * heads + h) * dim);
    attend_normalized(tokens, queries, dim, a.eps, kPrecision<T>.computing, in, out);
  }
  return out;
}

/// What kernels get of keys and values: these have no heads.
template <class T>
cpu::Operand without_heads(const Tensor<T>& tensor) {
  cpu::Operand operand = tensor.operand();
  operand.strides.head = int64_t{1} << 62;  // whatever is found there is no element
  return operand;
}

NormalizedProblem normalized_problem_of(const NormalizedCase& a, const Layout& layout) {
  NormalizedProblem problem = {problem_of(a.shape, layout), a.eps};
  problem.attention.scale = NAN;  // is not used
  return problem;
}

template <class T>
void check_case(const NormalizedCase& a, View view) {
  const Layout layout(a.shape);
  const Rows queries(layout.query_grids, kDense), keys(a.shape.grids, kDense);
  const NormalizedProblem problem = normalized_problem_of(a, layout);
  const Inputs inputs = random_inputs<T>(a, layout);
  const Results expected = expected_of<T>(a, layout, inputs);
  const int64_t heads = a.shape.heads, dim = a.shape.dim, shift = view == kSliced;
  Tensor<T> query(queries, heads, dim, view, shift), grad_output(queries, heads, dim, view, shift);
  Tensor<T> key(keys, 1, dim, view, shift), value(keys, 1, dim, view, shift);
  Tensor<T> output(queries, heads, dim, view, shift), grad_query(queries, heads, dim, view, shift);
  Tensor<T> grad_key(keys, 1, dim, view, shift), grad_value(keys, 1, dim, view, shift);
  fill(query, inputs.query);
  fill(key, inputs.key);
  fill(value, inputs.value);
  fill(grad_output, inputs.grad_output);
  const cpu::ForwardOperands forward = {query.operand(), without_heads(key), without_heads(value), output.operand()};
  const cpu::BackwardOperands backward = {grad_output.operand(),    query.operand(),      without_heads(key),
                                          without_heads(value),     grad_query.operand(), without_heads(grad_key),
                                          without_heads(grad_value)};
  const std::vector<Written<T>> results = {{"output", output, expected.output},
                                           {"grad_query", grad_query, expected.grad_query},
                                           {"grad_key", grad_key, expected.grad_key},
                                           {"grad_value", grad_value, expected.grad_value}};
  const std::string what = std::string("normalized, ") + a.shape.name + ", " + std::to_string(heads) + " heads of " +
                           std::to_string(dim) + ", " + std::to_string(layout.largest_region) + " keys, " +
                           kElementNames[kElement<T>] + ", " + kViewNames[view];
  for (const AttentionKernels* const kernels : instruction_sets()) {
    check_in_every_loop(results, what + ", " + kernels->instruction_set, [&](const ParallelLoop& loop) {
      check(kernels->normalized_forward[kElement<T>](problem, forward, loop), "the forward pass had no memory");
      check(kernels->normalized_backward[kElement<T>](problem, backward, loop), "the backward pass had no memory");
    });
  }
}

void check_views(const NormalizedCase& a, int views, int first) {
  for (int i = 0; i < views; ++i) {
    const auto view = static_cast<View>((first + i) % kViews);
    check_case<float>(a, view);
    check_case<double>(a, view);
    check_case<BFloat16>(a, view);
    check_case<Float16>(a, view);
  }
}

const std::vector<NormalizedCase> kNormalizedCases = {
    {{"one of everything", kDense, {{1, 1, 1}}, {1, 3, 3}, 1, 1, 1}},
    {{"partial at every edge", kDense, {{3, 7, 5}, {3, 7, 5}}, {2, 3, 3}, 9, 13, 1}},
    {{"less than one region", kDense, {{3, 5, 6}}, {9, 9, 9}, 8, 24, 1}},
    {{"one key per region", kDense, {{4, 3, 2}, {4, 3, 2}, {4, 3, 2}}, {1, 1, 1}, 2, 7, 1}},
    {{"many heads", kDense, {{1, 4, 5}}, {1, 3, 3}, 17, 8, 1}},
    {{"many channels", kDense, {{1, 6, 7}}, {1, 3, 3}, 2, 300, 0.25}},
    {{"scores far apart", kDense, {{2, 4, 4}}, {2, 2, 2}, 2, 43, 3}},
    {{"no eps", kDense, {{2, 4, 4}}, {2, 2, 2}, 3, 40, 1}, 0},
    {{"large eps", kDense, {{2, 4, 4}}, {2, 2, 2}, 3, 40, 1}, 10},
    {{"rows far from zero", kDense, {{2, 4, 4}}, {2, 2, 2}, 3, 64, 1}, 1e-5, 4, 4},
    {{"rows far below zero", kDense, {{1, 4, 5}}, {1, 2, 2}, 8, 7, 1}, 1e-5, -4, -4},
};

}  // namespace

void check_normalized() {
  for (const NormalizedCase& a : kNormalizedCases) check_views(a, kViews, 0);
  // In single precision nothing would be left of these rows; in double a variance from a sum of
  // squares would be off, and so would scores of queries that are not centred.
  for (const double query_mean : {0.0, 1e6}) {
    const Case shape = {"means of a million", kDense, {{2, 4, 4}}, {2, 2, 2}, 3, 40, 1};
    check_case<double>({shape, 1e-5, 1e6, query_mean}, kContiguous);
  }
  int number = 0;
  for (int64_t keys = 1; keys <= 18; ++keys) {
    const int64_t width = keys == 18 ? 40 : keys;
    for (const int64_t dim : {1, 7, 8, 13, 64}) {
      const int64_t heads = std::vector<int64_t>{1, 8, 9}[static_cast<size_t>(number % 3)];
      const Extent grid = {2, 2, width + width / 2};  // whole regions and halves
      check_views({{"rows of keys", kDense, {grid}, {1, 1, width}, heads, dim, 1}}, 1, number / 3);
      ++number;
    }
  }
}

bool normalized_without_memory(const ParallelLoop& loop) {
  const NormalizedCase a = {{"no memory", kDense, {{2, 6, 6}}, {1, 3, 3}, 2, 64, 1}};
  const Layout layout(a.shape);
  NormalizedProblem problem = normalized_problem_of(a, layout);
  problem.attention.largest_region = int64_t{1} << 48;
  const AttentionKernels& kernels = cpu::attention_kernels();
  return !kernels.normalized_forward[cpu::kBFloat16](problem, {}, loop) &&
         !kernels.normalized_backward[cpu::kBFloat16](problem, {}, loop);
}

}  // namespace llava_st::tests
