// Forward and backward of point-to-region attention on a CPU, compiled once per instruction set (see vectors.h).
//
// The work is bound by memory: keys and values are read once, in the order they lie in memory (all heads of a token
// together), while the next region is prefetched. A region's rows stay in the cache for a second look. Regions do not
// overlap, so every gradient has one writer and the result does not depend on the number of threads.
#pragma once

#include <math.h>
#include <stdlib.h>

#include "attention_problem.h"
#include "vectors.h"

namespace llava_st::LLAVA_ST_ISA {

using cpu::AttentionProblem;
using cpu::Operand;

constexpr int64_t kCacheLine = 64;

/// The tokens of one region in one tensor: the address of the first one's first row, and strides in elements.
template <class T>
struct Tokens {
  T* first;
  TokenStrides strides;
};

/// The region of one query, wherever its sample lies.
struct Site {
  int64_t query;
  int64_t sample;  // dense: number in the batch; packed: number of the video
  Extent grid;
  Region region;

  LLAVA_ST_INLINE Site(const AttentionProblem& problem, int64_t query) : query(query) {
    if (problem.packed()) {
      sample = video_of_query(problem.offsets, problem.videos, query);
      grid = problem.grids[sample];
      region = region_at(grid, problem.region, query - problem.offsets[sample].query);
    } else {
      const int64_t per_sample = regions_of(problem.grid, problem.region).count();
      sample = query / per_sample;
      grid = problem.grid;
      region = region_at(grid, problem.region, query % per_sample);
    }
  }

  template <class T>
  LLAVA_ST_INLINE Tokens<T> keys_of(const AttentionProblem& problem, const Operand& operand) const {
    TokenStrides strides = operand.strides;
    int64_t first = sample * strides.sample;
    if (problem.packed()) {
      first = problem.offsets[sample].key * operand.strides.w;
      strides = packed_strides(grid, operand.strides.w, operand.strides.head);
    }
    return {static_cast<T*>(operand.data) + first + strides.offset(region.first), strides};
  }

  template <class T>
  LLAVA_ST_INLINE Tokens<T> query_of(const AttentionProblem& problem, const Operand& operand) const {
    const int64_t first = problem.packed() ? query * operand.strides.w
                                           : sample * operand.strides.sample + operand.strides.offset(region.at);
    return {static_cast<T*>(operand.data) + first, operand.strides};
  }
};

/// Calls `visit(j, offset)` for every token of a region, in memory order.
template <class Visit>
LLAVA_ST_INLINE void for_tokens(Extent size, const TokenStrides& strides, Visit visit) {
  int64_t j = 0;
  for (int64_t t = 0; t < size.t; ++t) {
    for (int64_t h = 0; h < size.h; ++h) {
      for (int64_t w = 0; w < size.w; ++w) visit(j++, strides.offset({t, h, w}));
    }
  }
}

LLAVA_ST_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(static_cast<const char*>(row) + at);
}

/// Widens a row to the type that is computed in, times `factor`, padded with zeros to whole vectors.
template <class T>
LLAVA_ST_INLINE void widen(const T* row, Scalar<T> factor, int64_t dim, Scalar<T>* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(row + d) * factor);
  if (d < dim) store(to + d, load_first(row + d, dim - d) * factor);
}

/// The inner product of a widened row and a row in memory.
template <class T>
LLAVA_ST_INLINE Scalar<T> dot(const Scalar<T>* a, const T* b, int64_t dim) {
  Vector<T> sums[4] = {};
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) sums[i] += load(a + d + i * kLanes) * load(b + d + i * kLanes);
  }
  for (; d + kLanes <= dim; d += kLanes) sums[0] += load(a + d) * load(b + d);
  if (d < dim) sums[1] += load(a + d) * load_first(b + d, dim - d);
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/// sum += weight * row, where `sum` is widened.
template <class T>
LLAVA_ST_INLINE void add_scaled(const T* row, Scalar<T> weight, int64_t dim, Scalar<T>* sum) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(sum + d, load(sum + d) + weight * load(row + d));
  if (d < dim) store(sum + d, load(sum + d) + weight * load_first(row + d, dim - d));
}

/// row = factor * widened; `streamed` rows must be aligned for stream() and hold whole vectors.
template <bool streamed, class T>
LLAVA_ST_INLINE void write_scaled(const Scalar<T>* widened, Scalar<T> factor, int64_t dim, T* row) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    if constexpr (streamed) {
      stream(row + d, load(widened + d) * factor);
    } else {
      store(row + d, load(widened + d) * factor);
    }
  }
  if (d < dim) store_first(row + d, load(widened + d) * factor, dim - d);
}

LLAVA_ST_INLINE float exponential(float x) { return expf(x); }
LLAVA_ST_INLINE double exponential(double x) { return exp(x); }

/// Scores become weights in place. NaN and infinite scores give NaN, as in torch.
template <class S>
LLAVA_ST_INLINE void softmax(S* scores, int64_t n) {
  S largest = scores[0];
  for (int64_t j = 1; j < n; ++j) largest = scores[j] > largest ? scores[j] : largest;
  S sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += scores[j] = exponential(scores[j] - largest);
  const S inverse = 1 / sum;
  for (int64_t j = 0; j < n; ++j) scores[j] *= inverse;
}

/// A part of the work: some heads of some queries.
struct Share {
  int64_t first_unit, end_unit;
};

/// How the work is cut: each query's heads into `groups`. One group, so that whole tokens are read at once, unless
/// there are too few queries to keep every thread busy.
struct Cut {
  int64_t groups;

  Cut(const AttentionProblem& problem, int64_t threads) : groups(1) {
    const int64_t enough = 4 * threads;
    if (problem.queries < enough) groups = smaller(problem.heads, ceil_div(enough, problem.queries));
  }
  int64_t first_head(int64_t group, int64_t heads) const { return group * heads / groups; }
};

/// Memory of one thread. Rows are padded to whole vectors.
template <class S>
class Scratch {
 public:
  Scratch(int64_t weights, int64_t rows, int64_t dim)
      : row_(ceil_div(dim, kLanes) * kLanes),
        weights_(ceil_div(weights, kLanes) * kLanes),
        memory_(static_cast<S*>(aligned_alloc(kCacheLine, bytes(rows)))) {}
  ~Scratch() { free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool failed() const { return memory_ == nullptr; }
  S* weights() const { return memory_; }
  S* row(int64_t index) const { return memory_ + weights_ + index * row_; }
  void clear_row(int64_t index) const { memset(row(index), 0, row_ * sizeof(S)); }

 private:
  size_t bytes(int64_t rows) const {
    return ceil_div((weights_ + rows * row_) * sizeof(S), kCacheLine) * kCacheLine + kCacheLine;
  }

  int64_t row_, weights_;
  S* memory_;
};

/// Runs `work(begin, end)` over all units in parallel. `work` returns false when it found no memory.
template <class Work>
bool run_parallel(const cpu::ParallelLoop& loop, int64_t units, const Work& work) {
  struct Context {
    const Work& work;
    bool failed;
  } context = {work, false};
  loop.run(
      units,
      [](int64_t begin, int64_t end, void* opaque) {
        auto* context = static_cast<Context*>(opaque);
        if (!context->work(begin, end)) __atomic_store_n(&context->failed, true, __ATOMIC_RELAXED);
      },
      &context);
  return !context.failed;
}

template <class T>
bool forward(const AttentionProblem& problem, const cpu::ForwardOperands& operands, const cpu::ParallelLoop& loop) {
  using S = Scalar<T>;
  const Cut cut(problem, loop.threads);
  const int64_t dim = problem.head_dim;
  const int64_t row_bytes = dim * sizeof(T);

  return run_parallel(loop, problem.queries * cut.groups, [&](int64_t begin, int64_t end) {
    const int64_t most_heads = ceil_div(problem.heads, cut.groups);
    const int64_t most_keys = problem.largest_region;
    Scratch<S> scratch(most_heads * most_keys, 2 * most_heads, dim);
    if (scratch.failed()) return false;

    for (int64_t unit = begin; unit < end; ++unit) {
      const Site site(problem, unit / cut.groups);
      const Site next(problem, smaller(unit + 1, end - 1) / cut.groups);
      const Extent size = site.region.size;
      const int64_t keys = size.count();
      const int64_t first_head = cut.first_head(unit % cut.groups, problem.heads);
      const int64_t heads = cut.first_head(unit % cut.groups + 1, problem.heads) - first_head;
      const auto query = site.query_of<const T>(problem, operands.query);
      const auto key = site.keys_of<const T>(problem, operands.key);
      const auto value = site.keys_of<const T>(problem, operands.value);
      const auto output = site.query_of<T>(problem, operands.output);
      const int64_t key_ahead = next.keys_of<const T>(problem, operands.key).first - key.first;
      const int64_t value_ahead = next.keys_of<const T>(problem, operands.value).first - value.first;

      for (int64_t h = 0; h < heads; ++h) {
        widen(query.first + (first_head + h) * query.strides.head, static_cast<S>(problem.scale), dim,
              scratch.row(h));
      }
      for_tokens(size, key.strides, [&](int64_t j, int64_t offset) {
        for (int64_t h = 0; h < heads; ++h) {
          const T* row = key.first + offset + (first_head + h) * key.strides.head;
          prefetch_row(row + key_ahead, row_bytes);
          scratch.weights()[h * keys + j] = dot(scratch.row(h), row, dim);
        }
      });
      for (int64_t h = 0; h < heads; ++h) {
        softmax(scratch.weights() + h * keys, keys);
        scratch.clear_row(heads + h);
      }
      for_tokens(size, value.strides, [&](int64_t j, int64_t offset) {
        for (int64_t h = 0; h < heads; ++h) {
          const T* row = value.first + offset + (first_head + h) * value.strides.head;
          prefetch_row(row + value_ahead, row_bytes);
          add_scaled(row, scratch.weights()[h * keys + j], dim, scratch.row(heads + h));
        }
      });
      for (int64_t h = 0; h < heads; ++h) {
        write_scaled<false>(scratch.row(heads + h), static_cast<S>(1), dim,
                            output.first + (first_head + h) * output.strides.head);
      }
    }
    return true;
  });
}

template <bool streamed, class T>
bool backward_with(const AttentionProblem& problem, const cpu::BackwardOperands& operands,
                   const cpu::ParallelLoop& loop) {
  using S = Scalar<T>;
  const Cut cut(problem, loop.threads);
  const int64_t dim = problem.head_dim;
  const int64_t row_bytes = dim * sizeof(T);
  const S scale = static_cast<S>(problem.scale);

  return run_parallel(loop, problem.queries * cut.groups, [&](int64_t begin, int64_t end) {
    const int64_t most_heads = ceil_div(problem.heads, cut.groups);
    const int64_t most_keys = problem.largest_region;
    Scratch<S> scratch(2 * most_heads * most_keys, 3 * most_heads, dim);
    if (scratch.failed()) return false;

    for (int64_t unit = begin; unit < end; ++unit) {
      const Site site(problem, unit / cut.groups);
      const Site next(problem, smaller(unit + 1, end - 1) / cut.groups);
      const Extent size = site.region.size;
      const int64_t keys = size.count();
      const int64_t first_head = cut.first_head(unit % cut.groups, problem.heads);
      const int64_t heads = cut.first_head(unit % cut.groups + 1, problem.heads) - first_head;
      const auto grad_output = site.query_of<const T>(problem, operands.grad_output);
      const auto query = site.query_of<const T>(problem, operands.query);
      const auto key = site.keys_of<const T>(problem, operands.key);
      const auto value = site.keys_of<const T>(problem, operands.value);
      const auto grad_query = site.query_of<T>(problem, operands.grad_query);
      const auto grad_key = site.keys_of<T>(problem, operands.grad_key);
      const auto grad_value = site.keys_of<T>(problem, operands.grad_value);
      const int64_t key_ahead = next.keys_of<const T>(problem, operands.key).first - key.first;
      const int64_t value_ahead = next.keys_of<const T>(problem, operands.value).first - value.first;

      S* const weights = scratch.weights();
      S* const grad_scores = weights + heads * keys;
      const auto scaled_query = [&](int64_t h) { return scratch.row(h); };
      const auto wide_grad_output = [&](int64_t h) { return scratch.row(heads + h); };
      const auto wide_grad_query = [&](int64_t h) { return scratch.row(2 * heads + h); };

      for (int64_t h = 0; h < heads; ++h) {
        widen(query.first + (first_head + h) * query.strides.head, scale, dim, scaled_query(h));
        widen(grad_output.first + (first_head + h) * grad_output.strides.head, static_cast<S>(1), dim,
              wide_grad_output(h));
        scratch.clear_row(2 * heads + h);
      }
      for_tokens(size, key.strides, [&](int64_t j, int64_t offset) {
        for (int64_t h = 0; h < heads; ++h) {
          const T* row = key.first + offset + (first_head + h) * key.strides.head;
          prefetch_row(row + key_ahead, row_bytes);
          weights[h * keys + j] = dot(scaled_query(h), row, dim);
        }
      });
      for_tokens(size, value.strides, [&](int64_t j, int64_t offset) {
        for (int64_t h = 0; h < heads; ++h) {
          const T* row = value.first + offset + (first_head + h) * value.strides.head;
          prefetch_row(row + value_ahead, row_bytes);
          grad_scores[h * keys + j] = dot(wide_grad_output(h), row, dim);
        }
      });
      for (int64_t h = 0; h < heads; ++h) {
        S* const p = weights + h * keys;
        S* const ds = grad_scores + h * keys;
        softmax(p, keys);
        S mean = 0;
        for (int64_t j = 0; j < keys; ++j) mean += p[j] * ds[j];
        for (int64_t j = 0; j < keys; ++j) ds[j] = p[j] * (ds[j] - mean);
      }
      for_tokens(size, key.strides, [&](int64_t j, int64_t offset) {
        for (int64_t h = 0; h < heads; ++h) {
          add_scaled(key.first + offset + (first_head + h) * key.strides.head, grad_scores[h * keys + j], dim,
                     wide_grad_query(h));
        }
      });
      for_tokens(size, grad_key.strides, [&](int64_t j, int64_t offset) {
        for (int64_t h = 0; h < heads; ++h) {
          write_scaled<streamed>(scaled_query(h), grad_scores[h * keys + j], dim,
                                 grad_key.first + offset + (first_head + h) * grad_key.strides.head);
        }
      });
      for_tokens(size, grad_value.strides, [&](int64_t j, int64_t offset) {
        for (int64_t h = 0; h < heads; ++h) {
          write_scaled<streamed>(wide_grad_output(h), weights[h * keys + j], dim,
                                 grad_value.first + offset + (first_head + h) * grad_value.strides.head);
        }
      });
      for (int64_t h = 0; h < heads; ++h) {
        write_scaled<false>(wide_grad_query(h), scale, dim,
                            grad_query.first + (first_head + h) * grad_query.strides.head);
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

inline cpu::Forward forward_of(cpu::Element element) {
  switch (element) {
    case cpu::Element::kFloat:
      return forward<float>;
    case cpu::Element::kDouble:
      return forward<double>;
    case cpu::Element::kBFloat16:
      return forward<BFloat16>;
    default:
      return forward<Float16>;
  }
}

inline cpu::Backward backward_of(cpu::Element element) {
  switch (element) {
    case cpu::Element::kFloat:
      return backward<float>;
    case cpu::Element::kDouble:
      return backward<double>;
    case cpu::Element::kBFloat16:
      return backward<BFloat16>;
    default:
      return backward<Float16>;
  }
}

}  // namespace llava_st::LLAVA_ST_ISA
