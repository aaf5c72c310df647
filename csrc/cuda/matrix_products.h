// Matrix products by torch (cuBLAS), with a float result whatever the dtype of the factors.
#pragma once

#include "../torch_matrices.h"

namespace llava_st::cuda {

/// out = a b, for matrices of one dtype; out is float, and so are all sums.
inline void multiply_to_float(const Tensor& a, const Tensor& b, Tensor& out) {
  if (a.scalar_type() == ScalarType::Float) return multiply(a, b, out);
#if defined(__CUDACC__)
  std::array<StableIValue, 4> stack = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                                       torch::stable::detail::from(ScalarType::Float),
                                       torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the same tensor once more, to be released
#else
  // The CPU, on which the launchers are tested, has no such product.
  multiply(torch::stable::to(a, ScalarType::Float), torch::stable::to(b, ScalarType::Float), out);
#endif
}

}  // namespace llava_st::cuda
