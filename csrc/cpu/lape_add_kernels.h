// LAPE's addition on the CPU, forward and backward. Compiled once per instruction set.
#pragma once

#include "position_problem.h"
#include "rows.h"

namespace llava_st::LLAVA_ST_ISA {

/// row = (1 - ratio) low + ratio high; at ratio 0 `low` to the bit, whatever `high` is.
template <class S, class To>
LLAVA_ST_INLINE void blend(const S* table, int64_t channels, const Between<double>& between, To* row) {
  const S* const low = table + between.low * channels;
  const S* const high = table + between.high * channels;
  const S of_low = static_cast<S>(1 - between.ratio), of_high = static_cast<S>(between.ratio);
  const auto blended = [&](auto low, auto high) { return between.ratio == 0 ? low : of_low * low + of_high * high; };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) store(row + c, blended(load(low + c), load(high + c)));
  const int64_t rest = channels - c;
  if (rest > 0) store_first(row + c, blended(load_first(low + c, rest), load_first(high + c, rest)), rest);
}

/// What is left of a vector after it was stored as elements of T.
template <class T>
LLAVA_ST_INLINE Vector<T> rounded(Vector<T> vector) {
  T elements[kLanes];
  store(elements, vector);
  return load(elements);
}

/// Whether rows can be streamed to `videos`: whole vectors, each on its boundary.
template <class T>
LLAVA_ST_INLINE bool can_stream(const void* data, const TokenStrides& strides, int64_t channels) {
  constexpr uintptr_t alignment = sizeof(T) * kLanes < 32 ? sizeof(T) * kLanes : 32;
  const int64_t all = channels | strides.sample | strides.t | strides.h | strides.w;
  return all % kLanes == 0 && reinterpret_cast<uintptr_t>(data) % alignment == 0;
}

/// to = ((x + h) + w) + t for one token.
template <class T, bool round, bool streamed>
LLAVA_ST_INLINE void add_token(const T* x, const Scalar<T>* t, const Scalar<T>* h, const Scalar<T>* w, int64_t channels,
                               T* to) {
  const auto sum = [](auto x, auto h, auto w, auto t) {
    if constexpr (round) {
      return rounded<T>(rounded<T>(x + h) + w) + t;
    } else {
      return ((x + h) + w) + t;
    }
  };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    const auto y = sum(load(x + c), load(h + c), load(w + c), load(t + c));
    if constexpr (streamed) {
      stream(to + c, y);
    } else {
      store(to + c, y);
    }
  }
  const int64_t rest = channels - c;
  if (rest > 0) {
    const auto y =
        sum(load_first(x + c, rest), load_first(h + c, rest), load_first(w + c, rest), load_first(t + c, rest));
    store_first(to + c, y, rest);
  }
}

template <class T, bool round, bool streamed>
void add_rows(const cpu::Tables& tables, const cpu::Videos& from, const cpu::Videos& to, const Scalar<T>* resized,
              const cpu::ParallelLoop& loop) {
  const int64_t channels = tables.channels;
  const Extent grid = from.grid;
  cpu::run_parallel(loop, from.samples * grid.t * grid.h, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / (grid.t * grid.h);
      const Extent at = {row / grid.h % grid.t, row % grid.h, 0};
      const T* x = static_cast<const T*>(from.data) + sample * from.strides.sample + from.strides.offset(at);
      T* y = static_cast<T*>(to.data) + sample * to.strides.sample + to.strides.offset(at);
      const Scalar<T>* const t = resized + at.t * channels;
      const Scalar<T>* const h = resized + (grid.t + at.h) * channels;
      const Scalar<T>* w = resized + (grid.t + grid.h) * channels;
      for (int64_t column = 0; column < grid.w; ++column) {
        add_token<T, round, streamed>(x, t, h, w, channels, y);
        x += from.strides.w;
        y += to.strides.w;
        w += channels;
      }
    }
    if constexpr (streamed) stream_fence();
    return true;
  });
}

template <class T>
void add(const cpu::Tables& tables, const cpu::Videos& from, const cpu::Videos& to, bool round, void* scratch,
         const cpu::ParallelLoop& loop) {
  using S = Scalar<T>;
  const int64_t channels = tables.channels;
  const int64_t sizes[] = {from.grid.t, from.grid.h, from.grid.w};
  S* const resized = static_cast<S*>(scratch);
  cpu::run_parallel(loop, sizes[0] + sizes[1] + sizes[2], [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int number = 0;
      int64_t i = row;
      while (i >= sizes[number]) i -= sizes[number++];
      const cpu::Table& table = tables.axis[number];
      const auto between = patch_between<double>(i, sizes[number], table.count, tables.alignment_of(number));
      S* const to = resized + row * channels;
      blend(static_cast<const S*>(table.rows), channels, between, to);
      if (!round) continue;
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t lanes = smaller(kLanes, channels - c);
        store_first(to + c, rounded<T>(load_first(to + c, lanes)), lanes);
      }
    }
    return true;
  });
  // In place, what is written was read just before, and is in the cache.
  const bool streamed = from.data != to.data && can_stream<T>(to.data, to.strides, channels);
  const auto rows = round ? (streamed ? add_rows<T, true, true> : add_rows<T, true, false>)
                          : (streamed ? add_rows<T, false, true> : add_rows<T, false, false>);
  rows(tables, from, to, resized, loop);
}

template <class S, class To>
LLAVA_ST_INLINE void add_row(const S* from, int64_t channels, To* to) {
  for (int64_t c = 0; c < channels; ++c) to[c] += from[c];
}

/// column += x and row += x, of one token; both are padded to whole vectors.
template <class T, class S>
LLAVA_ST_INLINE void add_token_gradient(const T* x, int64_t channels, S* column, S* row) {
  const auto add = [](S* to, auto v) { store(to, load(to) + v); };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    const auto v = load(x + c);
    add(column + c, v);
    add(row + c, v);
  }
  if (c < channels) {
    const auto v = load_first(x + c, channels - c);
    add(column + c, v);
    add(row + c, v);
  }
}

/// The sums of one segment, as rows of `stride` numbers: over each of its frames, over each row and each column of the
/// grid. Memory is read in the order in which it lies.
template <class T>
void sum_segment(const cpu::Videos& videos, const cpu::Segment& segment, int64_t channels, int64_t stride,
                 Scalar<T>* sums) {
  using S = Scalar<T>;
  const Extent grid = videos.grid;
  S* const rows = sums + segment.frames(grid) * stride;
  S* const columns = rows + grid.h * stride;
  S* const row_sum = columns + grid.w * stride;
  memset(sums, 0, (segment.frames(grid) + grid.h + grid.w) * stride * sizeof(S));
  for (int64_t row = segment.begin; row < segment.end; ++row) {
    const int64_t frame = row / grid.h;  // counted through all samples
    const Extent at = {frame % grid.t, row % grid.h, 0};
    const T* x =
        static_cast<const T*>(videos.data) + frame / grid.t * videos.strides.sample + videos.strides.offset(at);
    memset(row_sum, 0, stride * sizeof(S));
    for (int64_t w = 0; w < grid.w; ++w, x += videos.strides.w) {
      add_token_gradient(x, channels, columns + w * stride, row_sum);
    }
    add_row(row_sum, channels, sums + (frame - segment.begin / grid.h) * stride);
    add_row(row_sum, channels, rows + at.h * stride);
  }
}

/// Adds what a segment has for `count` patches along one axis, from patch `first` on and round again, to the anchors
/// that they lie between: channels `begin` to `end`.
template <class S>
void add_to_anchors(const S* sums, int64_t stride, int64_t first, int64_t count, int64_t size,
                    const cpu::Tables& tables, int axis, double* anchors, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < count; ++i, sums += stride) {
    const auto between =
        patch_between<double>((first + i) % size, size, tables.axis[axis].count, tables.alignment_of(axis));
    double* const low = anchors + between.low * tables.channels;
    double* const high = anchors + between.high * tables.channels;
    for (int64_t c = begin; c < end; ++c) low[c] += (1 - between.ratio) * sums[c];
    if (between.ratio == 0) continue;
    for (int64_t c = begin; c < end; ++c) high[c] += between.ratio * sums[c];
  }
}

/// Segments are summed on their own, then added up in order: every number is a sum in the same order in every run.
template <class T>
void add_backward(const cpu::Tables& tables, const cpu::Videos* groups, const cpu::Segment* segments, int64_t count,
                  void* scratch, double* result, const cpu::ParallelLoop& loop) {
  using S = Scalar<T>;
  const int64_t channels = tables.channels, stride = cpu::segment_stride(channels);
  S* const sums = static_cast<S*>(scratch);
  cpu::run_parallel(loop, count, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      sum_segment<T>(groups[segments[i].group], segments[i], channels, stride, sums + segments[i].first * stride);
    }
    return true;
  });
  double* const anchors[] = {result, result + tables.axis[0].count * channels,
                             result + (tables.axis[0].count + tables.axis[1].count) * channels};
  constexpr int64_t kPart = 64;  // channels: whole cache lines
  cpu::run_parallel(loop, ceil_div(channels, kPart), [&](int64_t first, int64_t last) {
    const int64_t begin = first * kPart, end = smaller(last * kPart, channels);
    for (int64_t row = 0; row < tables.rows(); ++row) {
      memset(result + row * channels + begin, 0, (end - begin) * sizeof(double));
    }
    for (int64_t i = 0; i < count; ++i) {
      const cpu::Segment& segment = segments[i];
      const Extent grid = groups[segment.group].grid;
      const int64_t counts[] = {segment.frames(grid), grid.h, grid.w};
      const int64_t sizes[] = {grid.t, grid.h, grid.w};
      const S* from = sums + segment.first * stride;
      for (int axis = 0; axis < 3; from += counts[axis++] * stride) {
        add_to_anchors(from, stride, axis == 0 ? segment.begin / grid.h : 0, counts[axis], sizes[axis], tables, axis,
                       anchors[axis], begin, end);
      }
    }
    return true;
  });
}

}  // namespace llava_st::LLAVA_ST_ISA
