// From calls to CUTLASS's products: each function says whether it has done the call. What does not fit, and everything
// where the library was built without CUTLASS, is left to torch's products.
#pragma once

#include "../tables.h"

#if !defined(LLAVA_ST_CUTLASS_SM80) && !defined(LLAVA_ST_CUTLASS_SM90)

namespace llava_st {

inline bool fused_forward(const char*, const LinearCall&, const FloatPositions&, Tensor*, Tensor&, void*) {
  return false;
}
inline bool fused_backward(const char*, const Tensor&, const Tensor&, const Tensor&, Tensor&, Tensor&, void*) {
  return false;
}

}  // namespace llava_st

#else

#include <climits>
#include <type_traits>

#include "../../element_types.h"
#include "choice.h"
#include "products.h"

namespace llava_st {

/// Whether rows of a matrix of 16-bit numbers can be read by TMA, and in packets of sixteen bytes.
inline bool fits_fused(const Tensor& matrix) {
  constexpr int64_t packet = sizeof(cuda::Words) / sizeof(uint16_t);
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const int64_t stride = rows > 1 ? matrix.stride(0) : columns;
  return rows > 0 && rows <= INT_MAX && columns > 0 && columns <= INT_MAX && columns % packet == 0 &&
         matrix.stride(1) == 1 && stride >= columns && stride % packet == 0 &&
         cuda::aligned(static_cast<const uint16_t*>(matrix.const_data_ptr()), packet);
}

template <class T>
cuda::MatrixRows<const T> matrix_rows(const Tensor& matrix) {
  return {cuda::input_data<T>(matrix), matrix.size(0) > 1 ? matrix.stride(0) : matrix.size(1)};
}

/// Calls `run` with an element of the tensor's dtype, if it is of 16 bits.
template <class Run>
void with_fused_element(const char* op, Argument argument, const Run& run) {
  with_element(op, argument, [&](auto element) {
    if constexpr (sizeof(element) == sizeof(uint16_t)) run(element);
  });
}

/// Whether a product of a kind that there is was launched.
template <class Product>
bool run_fused(const char* op, const Product& product, void* stream) {
  const cuda::Gpu gpu = cuda::Gpu::current();
  const char* error = nullptr;
  switch (cuda::choose_fused(gpu, product.rows, product.channels)) {
    case cuda::Fused::kSm80:
#if defined(LLAVA_ST_CUTLASS_SM80)
      error = cuda::multiply_sm80(product, stream);
      break;
#endif
    case cuda::Fused::kSm90:
#if defined(LLAVA_ST_CUTLASS_SM90)
      error = cuda::multiply_sm90(product, gpu.multiprocessors, stream);
      break;
#endif
    case cuda::Fused::kNone:
      return false;
  }
  LLAVA_ST_CHECK(error == nullptr, op, ": a product by CUTLASS fails: ", error);
  return true;
}

/// `preactivation` is null where it is not kept.
inline bool fused_forward(const char* op, const LinearCall& call, const FloatPositions& positions,
                          Tensor* preactivation, Tensor& activation, void* stream) {
  constexpr int64_t packet = sizeof(cuda::Words) / sizeof(uint16_t);
  if (!cuda::wants_cutlass() || !fits_fused(call.features) || !fits_fused(call.weight)) return false;
  if (call.channels() % packet != 0) return false;
  bool done = false;
  with_fused_element(op, {"features", call.features}, [&](auto element) {
    using T = decltype(element);
    cuda::ForwardProduct<T> product = {};
    product.rows = static_cast<int>(call.rows());
    product.channels = static_cast<int>(call.channels());
    product.inputs = static_cast<int>(call.inputs());
    product.features = matrix_rows<T>(call.features);
    product.weight = matrix_rows<T>(call.weight);
    product.positions = {cuda::input_data<float>(positions.bias),
                         cuda::input_data<float>(positions.temporal),
                         cuda::input_data<float>(positions.height),
                         cuda::input_data<float>(positions.width),
                         call.channels(),
                         cuda::Divisor(call.grid.w),
                         cuda::Divisor(call.grid.h),
                         cuda::Divisor(call.grid.t)};
    product.activation = cuda::result_data<T>(activation);
    product.preactivation = preactivation ? cuda::result_data<T>(*preactivation) : nullptr;
    done = run_fused(op, product, stream);
  });
  return done;
}

inline bool fused_backward(const char* op, const Tensor& grad_output, const Tensor& weight, const Tensor& preactivation,
                           Tensor& gradient, Tensor& activation, void* stream) {
  const bool fits = fits_fused(grad_output) && fits_fused(weight) && fits_fused(preactivation);
  if (!cuda::wants_cutlass() || !fits) return false;
  bool done = false;
  with_fused_element(op, {"preactivation", preactivation}, [&](auto element) {
    using T = decltype(element);
    cuda::BackwardProduct<T> product = {};
    product.rows = static_cast<int>(preactivation.size(0));
    product.channels = static_cast<int>(preactivation.size(1));
    product.inputs = static_cast<int>(weight.size(0));
    product.grad_output = matrix_rows<T>(grad_output);
    product.weight = matrix_rows<T>(weight);
    product.x = matrix_rows<T>(preactivation);
    product.gradient = cuda::result_data<T>(gradient);
    product.activation = cuda::result_data<T>(activation);
    done = run_fused(op, product, stream);
  });
  return done;
}

}  // namespace llava_st

#endif
