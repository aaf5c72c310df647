// Matrix products with an epilogue, by CUTLASS: what goes into them and out. Knows nothing of CUTLASS, nor of torch.
#pragma once

#include "positions.cuh"

namespace llava_st::cuda {

/// A matrix whose rows are contiguous, `stride` apart, and aligned to sixteen bytes.
template <class T>
struct MatrixRows {
  T* data;
  int64_t stride;
};

/// activation = gelu(features weight^T + positions), and what goes into the GELU unless `preactivation` is null.
/// The results are contiguous.
template <class T>
struct ForwardProduct {
  int rows, channels, inputs;
  MatrixRows<const T> features, weight;  // `[rows, inputs]`, `[channels, inputs]`
  Positions positions;
  T *activation, *preactivation;
};

/// gradient = (grad_output weight) gelu'(x), and activation = gelu(x). The results are contiguous.
template <class T>
struct BackwardProduct {
  int rows, channels, inputs;
  MatrixRows<const T> grad_output, weight, x;  // `[rows, inputs]`, `[inputs, channels]`, `[rows, channels]`
  T *gradient, *activation;
};

// One function for each architecture, direction and dtype, each in a file of its own. They return null, or what went
// wrong.

#define LLAVA_ST_DECLARE_PRODUCTS(T)                                                              \
  const char* multiply_sm80(const ForwardProduct<T>& product, void* stream);                      \
  const char* multiply_sm80(const BackwardProduct<T>& product, void* stream);                     \
  const char* multiply_sm90(const ForwardProduct<T>& product, int multiprocessors, void* stream); \
  const char* multiply_sm90(const BackwardProduct<T>& product, int multiprocessors, void* stream);
LLAVA_ST_DECLARE_PRODUCTS(BFloat16)
LLAVA_ST_DECLARE_PRODUCTS(Float16)
#undef LLAVA_ST_DECLARE_PRODUCTS

}  // namespace llava_st::cuda
