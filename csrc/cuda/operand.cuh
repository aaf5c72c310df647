// A tensor as kernels see it: where its first row lies, and how far apart its rows are.
#pragma once

#include "../geometry/regions.h"
#include "hardware.cuh"

namespace llava_st::cuda {

/// A `[sample, T, H, W, heads, D]` tensor, or one without heads, with contiguous rows of D elements. Packed
/// `[tokens, heads, D]` tensors keep the stride of a token in `strides.w`; their other token strides follow from each
/// video's grid.
template <class T>
struct Operand {
  T* data;
  TokenStrides strides;
};

/// Whether all rows can be read in packets of so many elements.
template <class T>
bool aligned(const T* data, int elements) {
  return reinterpret_cast<uintptr_t>(data) % (elements * sizeof(T)) == 0;
}

template <class T>
bool aligned(const Operand<T>& operand, int elements) {
  const TokenStrides& s = operand.strides;
  const int64_t rest = (s.sample | s.t | s.h | s.w | s.head) % elements;
  return rest == 0 && aligned(operand.data, elements);
}

}  // namespace llava_st::cuda
