// Products for sm_80 and later: mma.m16n8k16 fed by cp.async in four stages (CUTLASS 2), and a visitor as epilogue.
#pragma once

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>
#include <cutlass/layout/matrix.h>

#include "sm80_visitors.cuh"

namespace llava_st::cuda {

/// A kernel with a name of its own in reports. WEIGHT_LAYOUT is that of the second factor, `[inputs, channels]`.
template <class T, class WEIGHT_LAYOUT, template <class, class> class Visitor>
struct Product80 {
  using Element = typename CutlassElement<T>::Type;
  using Tile = cutlass::gemm::GemmShape<128, 128, 32>;
  using WarpTile = cutlass::gemm::GemmShape<64, 64, 32>;
  static constexpr int kStages = 4, kElements = sizeof(Words) / sizeof(T);
  using ThreadMap = cutlass::epilogue::threadblock::OutputTileThreadLayout<Tile, WarpTile, Element, kElements>;
  using FusionCallbacks = Visitor<ThreadMap, T>;
  using RowMajor = cutlass::layout::RowMajor;
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      Element, RowMajor, cutlass::ComplexTransform::kNone, kElements,       //
      Element, WEIGHT_LAYOUT, cutlass::ComplexTransform::kNone, kElements,  //
      Element, RowMajor, kElements, float, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, WarpTile,
      cutlass::gemm::GemmShape<16, 8, 16>, FusionCallbacks,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kStages, cutlass::arch::OpMultiplyAdd>::GemmKernel;
};

/// Launches a kernel: `a` `[m, k]` times `b`, whose rows or columns are `b.stride` apart.
template <class Kernel, class T>
const char* run_sm80(int m, int n, int k, const MatrixRows<const T>& a, const MatrixRows<const T>& b,
                     const typename Kernel::FusionCallbacks::Arguments& epilogue, void* stream) {
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  const typename Gemm::Arguments arguments(cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k}, 1, epilogue, a.data,
                                           b.data, nullptr, nullptr, 0, 0, 0, 0, a.stride, b.stride, 0, 0);
  Gemm gemm;
  cutlass::Status status = gemm.initialize(arguments, nullptr, static_cast<cudaStream_t>(stream));
  if (status == cutlass::Status::kSuccess) status = gemm.run(static_cast<cudaStream_t>(stream));
  return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
}

// The kernels' names.

template <class T>
struct linear_gelu_sm80 : Product80<T, cutlass::layout::ColumnMajor, ForwardVisitor80>::Kernel {};
template <class T>
struct gelu_gradient_sm80 : Product80<T, cutlass::layout::RowMajor, BackwardVisitor80>::Kernel {};

template <class T>
const char* forward_sm80(const ForwardProduct<T>& product, void* stream) {
  return run_sm80<linear_gelu_sm80<T>>(product.rows, product.channels, product.inputs, product.features, product.weight,
                                       {product.positions, product.activation, product.preactivation}, stream);
}

template <class T>
const char* backward_sm80(const BackwardProduct<T>& product, void* stream) {
  return run_sm80<gelu_gradient_sm80<T>>(product.rows, product.channels, product.inputs, product.grad_output,
                                         product.weight,
                                         {product.x, product.gradient, product.activation, product.channels}, stream);
}

}  // namespace llava_st::cuda
