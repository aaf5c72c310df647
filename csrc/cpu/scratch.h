// Memory that a thread works in. Compiled once per instruction set.
#pragma once

#include <stdlib.h>

#include "../geometry/regions.h"
#include "rows.h"

namespace llava_st::LLAVA_ST_ISA {

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

}  // namespace llava_st::LLAVA_ST_ISA
