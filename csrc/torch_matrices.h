// Matrices as torch multiplies and views them: for the CPU and the CUDA library.
#pragma once

#include <array>

#include "checks.h"

namespace llava_st {

/// out = a b, for matrices of one dtype.
inline void multiply(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 3> stack = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                                       torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the same tensor once more, to be released
}

inline Tensor rows_of(const Tensor& matrix, int64_t first, int64_t count) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 0, first, count);
}
inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

}  // namespace llava_st
