// The epilogues of sm80.cuh: visitors of CUTLASS 2's epilogue, which hands each thread packets of a row, eight channels
// of sixteen bytes, one after the other. All that is fused happens in one visitor, so that results are stored where
// they are calculated.
#pragma once

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "products.h"
#include "types.cuh"

namespace llava_st::cuda {

/// What CUTLASS wants of a visitor beside the callbacks: ARGUMENTS go to the device as they are.
template <class ARGUMENTS>
struct VisitorBase80 {
  struct SharedStorage {};
  using Arguments = ARGUMENTS;
  using Params = ARGUMENTS;

  template <class ProblemShape>
  static Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }

  VisitorBase80() = default;
  CUTLASS_DEVICE VisitorBase80(const Params& params, const SharedStorage&) : params(&params) {}

  const Params* params;
};

/// Rows and channels of a thread's packets: a tensor of (element, packet of a row, row, step).
template <class ThreadMap, class ProblemShape>
CUTLASS_DEVICE auto packet_coordinates(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
  return cute::group_modes<3, 6>(ThreadMap::partition(cute::make_identity_tensor(shape), thread, tile));
}

template <class T>
CUTLASS_DEVICE Words* packet_at(T* rows, int64_t stride, int row, int channel) {
  return reinterpret_cast<Words*>(rows + row * stride + channel);
}

template <class T>
struct ForwardArguments80 {
  Positions positions;
  T *activation, *preactivation;
};

template <class ThreadMap, class T>
struct ForwardVisitor80 : VisitorBase80<ForwardArguments80<T>> {
  using VisitorBase80<ForwardArguments80<T>>::VisitorBase80;

  template <class Coordinates, class ProblemShape>
  struct Callbacks : cutlass::epilogue::threadblock::detail::EmptyCallbacks {
    CUTLASS_DEVICE Callbacks(Coordinates coordinates, ProblemShape shape, const ForwardArguments80<T>& to)
        : coordinates(coordinates), shape(shape), to(to) {}

    Coordinates coordinates;
    ProblemShape shape;
    const ForwardArguments80<T>& to;

    template <int COUNT>
    CUTLASS_DEVICE void visit(int step, int of_step, int of_row, int, const cutlass::Array<float, COUNT>& product) {
      static_assert(COUNT * sizeof(T) == sizeof(Words));
      const auto at = coordinates(0, of_row, of_step, step);
      if (!cute::elem_less(at, shape)) return;
      const int row = cute::get<0>(at), channel = cute::get<1>(at);
      float x[COUNT];
      LLAVA_ST_UNROLL
      for (int i = 0; i < COUNT; ++i) x[i] = product[i];
      to.positions.at(row).template add_to<COUNT>(x, channel);
      Words packet;
      if (to.preactivation != nullptr) {
        pack<T>(x, packet);
        store_streaming(packet_at(to.preactivation, to.positions.channels, row, channel), packet);
      }
      LLAVA_ST_UNROLL
      for (int i = 0; i < COUNT; ++i) x[i] = gelu(x[i]);
      pack<T>(x, packet);
      store(packet_at(to.activation, to.positions.channels, row, channel), packet);
    }
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
    const auto coordinates = packet_coordinates<ThreadMap>(tile, thread, shape);
    return Callbacks<cute::remove_cvref_t<decltype(coordinates)>, ProblemShape>(coordinates, shape, *this->params);
  }
};

template <class T>
struct BackwardArguments80 {
  MatrixRows<const T> x;
  T *gradient, *activation;
  int64_t channels;
};

template <class ThreadMap, class T>
struct BackwardVisitor80 : VisitorBase80<BackwardArguments80<T>> {
  using VisitorBase80<BackwardArguments80<T>>::VisitorBase80;

  template <class Coordinates, class ProblemShape>
  struct Callbacks : cutlass::epilogue::threadblock::detail::EmptyCallbacks {
    CUTLASS_DEVICE Callbacks(Coordinates coordinates, ProblemShape shape, const BackwardArguments80<T>& arguments)
        : coordinates(coordinates), shape(shape), arguments(arguments) {}

    static constexpr int OF_ROW = decltype(cute::size<1>(Coordinates{}))::value;
    static constexpr int ROWS = decltype(cute::size<2>(Coordinates{}))::value;  // of a step

    Coordinates coordinates;
    ProblemShape shape;
    const BackwardArguments80<T>& arguments;
    Words x[ROWS][OF_ROW];  // of a step, on their way while products are exchanged

    CUTLASS_DEVICE void begin_step(int step) {
      LLAVA_ST_UNROLL
      for (int row = 0; row < ROWS; ++row) {
        LLAVA_ST_UNROLL
        for (int i = 0; i < OF_ROW; ++i) {
          const auto at = coordinates(0, i, row, step);
          const auto* const from = arguments.x.data + cute::get<0>(at) * arguments.x.stride + cute::get<1>(at);
          x[row][i] = load_once(reinterpret_cast<const Words*>(from), cute::elem_less(at, shape));
        }
      }
    }

    template <int COUNT>
    CUTLASS_DEVICE void visit(int step, int of_step, int of_row, int, const cutlass::Array<float, COUNT>& product) {
      static_assert(COUNT * sizeof(T) == sizeof(Words));
      const auto at = coordinates(0, of_row, of_step, step);
      if (!cute::elem_less(at, shape)) return;
      const int row = cute::get<0>(at), channel = cute::get<1>(at);
      float gradient[COUNT], activation[COUNT];
      unpack<T>(x[of_step][of_row], activation);
      LLAVA_ST_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        const Gelu at_x = gelu_with_derivative(activation[i]);
        activation[i] = at_x.value;
        gradient[i] = product[i] * at_x.derivative;
      }
      Words packet;
      pack<T>(gradient, packet);
      store(packet_at(arguments.gradient, arguments.channels, row, channel), packet);
      pack<T>(activation, packet);
      store(packet_at(arguments.activation, arguments.channels, row, channel), packet);
    }
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
    const auto coordinates = packet_coordinates<ThreadMap>(tile, thread, shape);
    return Callbacks<cute::remove_cvref_t<decltype(coordinates)>, ProblemShape>(coordinates, shape, *this->params);
  }
};

}  // namespace llava_st::cuda
