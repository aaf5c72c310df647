// Arithmetic on rows of D elements. "Wide" rows are of the type that is computed in, padded to whole vectors; the
// others are as they lie in memory. Compiled once per instruction set.
#pragma once

#include "vectors.h"

namespace llava_st::LLAVA_ST_ISA {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kPrefetchAhead = 4096;  // bytes

/// Prefetches what lies a little further than a row: rows follow each other in memory. (The hardware prefetches too,
/// but not far enough to cover the arithmetic between two rows.)
LLAVA_ST_INLINE void prefetch_after(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kCacheLine) {
    __builtin_prefetch(static_cast<const char*>(row) + kPrefetchAhead + at);
  }
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

}  // namespace llava_st::LLAVA_ST_ISA
