// Products for sm_90a: wgmma fed by TMA, one warp group calculating while another finishes its tile (CUTLASS 3's
// ping-pong schedule), and a tree of visitors as epilogue.
#pragma once

#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "sm90_visitors.cuh"

namespace llava_st::cuda {

using Tile90 = cute::Shape<cute::_128, cute::_128, cute::_64>;
using Cluster90 = cute::Shape<cute::_2, cute::_1, cute::_1>;
using RowMajor = cutlass::layout::RowMajor;
using EpilogueSchedule90 = cutlass::epilogue::TmaWarpSpecialized;

/// How an epilogue lies that reads SOURCE, or void, and writes ELEMENT; and the node that stores a second result.
template <class SOURCE, class ELEMENT>
struct Epilogue90 {
  using Descriptor =
      cutlass::epilogue::collective::detail::EpilogueDescriptor<Tile90, cutlass::epilogue::collective::EpilogueTileAuto,
                                                                SOURCE, ELEMENT, EpilogueSchedule90>;
  using StoreDescriptor = cutlass::epilogue::collective::detail::AuxStoreDescriptor<Descriptor, RowMajor, ELEMENT>;
  using StoreStride = typename StoreDescriptor::Stride;
  /// Stores nothing where the pointer is null.
  using Store = evt::Sm90AuxStore<StoreDescriptor::Stages, typename Descriptor::EpilogueTile, ELEMENT,
                                  cutlass::FloatRoundStyle::round_to_nearest, StoreStride,
                                  typename StoreDescriptor::SmemLayoutAtom, typename StoreDescriptor::CopyOpR2S>;
};

/// WEIGHT_LAYOUT is that of the second factor, `[inputs, channels]`.
template <class ELEMENT, class WEIGHT_LAYOUT, class SOURCE, class TREE>
struct Product90 {
  static constexpr int kElements = sizeof(Words) / sizeof(ELEMENT);
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile90, Cluster90,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, SOURCE, RowMajor, kElements, ELEMENT, RowMajor,
      kElements, EpilogueSchedule90, TREE>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, ELEMENT, RowMajor, kElements, ELEMENT, WEIGHT_LAYOUT,
      kElements, float, Tile90, Cluster90,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
};

/// Strides of a matrix whose rows are so far apart, or, of a second factor that is no RowMajor, whose columns are.
template <class Stride>
Stride stride_of(int64_t rows) {
  Stride stride = {};
  if constexpr (cute::is_static<cute::remove_cvref_t<decltype(cute::get<0>(stride))>>::value) {
    cute::get<1>(stride) = rows;
  } else {
    cute::get<0>(stride) = rows;
  }
  return stride;
}

/// `epilogue` goes to the tree. The source `c` may be null, and `d` is contiguous.
template <class Kernel, class T>
const char* run_sm90(int m, int n, int k, const MatrixRows<const T>& a, const MatrixRows<const T>& b,
                     const MatrixRows<const T>& c, T* d,
                     const typename Kernel::CollectiveEpilogue::FusionCallbacks::Arguments& epilogue,
                     int multiprocessors, void* stream) {
  typename Kernel::Arguments arguments = {};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {m, n, k, 1};
  arguments.mainloop.ptr_A = in_cutlass(a.data);
  arguments.mainloop.dA = stride_of<typename Kernel::StrideA>(a.stride);
  arguments.mainloop.ptr_B = in_cutlass(b.data);
  arguments.mainloop.dB = stride_of<typename Kernel::StrideB>(b.stride);
  arguments.epilogue.thread = epilogue;
  if constexpr (!cute::is_void_v<typename Kernel::CollectiveEpilogue::ElementC>) {
    arguments.epilogue.ptr_C = in_cutlass(c.data);
    arguments.epilogue.dC = stride_of<typename Kernel::StrideC>(c.stride);
  }
  arguments.epilogue.ptr_D = in_cutlass(d);
  arguments.epilogue.dD = stride_of<typename Kernel::StrideD>(n);
  arguments.hw_info.sm_count = multiprocessors;
  cutlass::gemm::device::GemmUniversalAdapter<Kernel> gemm;
  cutlass::Status status = gemm.can_implement(arguments);
  if (status == cutlass::Status::kSuccess && gemm.get_workspace_size(arguments) > 0) return "it wants a workspace";
  if (status == cutlass::Status::kSuccess) {
    status = gemm.initialize(arguments, nullptr, static_cast<cudaStream_t>(stream));
  }
  if (status == cutlass::Status::kSuccess) status = gemm.run(static_cast<cudaStream_t>(stream));
  return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
}

// Forward: (accumulators + positions), stored if wanted, and their GELU.

template <class ELEMENT>
using ForwardTree90 =
    evt::Sm90EVT<evt::Sm90Compute<GeluFunction, ELEMENT, float, cutlass::FloatRoundStyle::round_to_nearest>,
                 evt::Sm90EVT<typename Epilogue90<void, ELEMENT>::Store, PositionNode90>>;

template <class T, class ELEMENT = typename CutlassElement<T>::Type>
struct linear_gelu_sm90 : Product90<ELEMENT, cutlass::layout::ColumnMajor, void, ForwardTree90<ELEMENT>>::Kernel {};

template <class T>
const char* forward_sm90(const ForwardProduct<T>& product, int multiprocessors, void* stream) {
  using Kernel = linear_gelu_sm90<T>;
  using StoreStride = typename Epilogue90<void, typename CutlassElement<T>::Type>::StoreStride;
  return run_sm90<Kernel, T>(
      product.rows, product.channels, product.inputs, product.features, product.weight, {nullptr, 0},
      product.activation,
      {{{product.positions}, {in_cutlass(product.preactivation), stride_of<StoreStride>(product.channels)}}, {}},
      multiprocessors, stream);
}

// Backward: x is the source.

template <class ELEMENT>
using BackwardTree90 =
    evt::Sm90EVT<GeluGradientNode90<typename Epilogue90<ELEMENT, ELEMENT>::Store>, evt::Sm90SrcFetch<ELEMENT>>;

template <class T, class ELEMENT = typename CutlassElement<T>::Type>
struct gelu_gradient_sm90 : Product90<ELEMENT, cutlass::layout::RowMajor, ELEMENT, BackwardTree90<ELEMENT>>::Kernel {};

template <class T>
const char* backward_sm90(const BackwardProduct<T>& product, int multiprocessors, void* stream) {
  using Kernel = gelu_gradient_sm90<T>;
  using StoreStride =
      typename Epilogue90<typename CutlassElement<T>::Type, typename CutlassElement<T>::Type>::StoreStride;
  return run_sm90<Kernel, T>(
      product.rows, product.channels, product.inputs, product.grad_output, product.weight, product.x, product.gradient,
      {{}, {in_cutlass(product.activation), stride_of<StoreStride>(product.channels)}}, multiprocessors, stream);
}

}  // namespace llava_st::cuda
