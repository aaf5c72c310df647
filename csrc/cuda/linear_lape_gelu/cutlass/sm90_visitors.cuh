// The epilogues of sm90.cuh: nodes of CUTLASS 3's trees of visitors (EVT). Each thread has numbers as wgmma leaves
// them, pairs of neighbouring channels; results reach memory by TMA, which drops what is outside of a matrix.
#pragma once

#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>

#include "products.h"
#include "types.cuh"

namespace llava_st::cuda {

namespace evt = cutlass::epilogue::fusion;

/// Whether a thread's numbers, whose coordinates LAYOUT gives, are pairs of neighbouring channels of a row.
template <class LAYOUT, int... PAIRS>
constexpr bool in_pairs(cute::seq<PAIRS...>) {
  using cute::Int;
  return ((cute::is_constant<1, decltype(cute::get<1>(LAYOUT{}(Int<2 * PAIRS + 1>{})) -
                                         cute::get<1>(LAYOUT{}(Int<2 * PAIRS>{})))>::value &&
           cute::is_constant<0, decltype(cute::get<0>(LAYOUT{}(Int<2 * PAIRS + 1>{})) -
                                         cute::get<0>(LAYOUT{}(Int<2 * PAIRS>{})))>::value) &&
          ...);
}

/// A leaf of the tree: the accumulators with the bias and the positions of their rows.
struct PositionNode90 {
  struct SharedStorage {};
  struct Arguments {
    Positions positions;
  };
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE PositionNode90() {}
  CUTLASS_HOST_DEVICE PositionNode90(const Params& params, const SharedStorage&) : params(&params) {}

  const Params* params;

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Arguments>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const evt::detail::ProducerLoadArgs<Arguments...>&) {
    return evt::detail::EmptyProducerLoadCallbacks{};
  }

  template <class Coordinates>
  struct ConsumerStoreCallbacks : evt::detail::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE ConsumerStoreCallbacks(Coordinates coordinates, int rows, int channels, const Positions& positions)
        : coordinates(coordinates), rows(rows), channels(channels), positions(positions) {}

    Coordinates coordinates;  // (copy, copies along m, along n, subtiles along m, along n)
    int rows, channels;
    const Positions& positions;

    template <class Accumulator, int COUNT>
    CUTLASS_DEVICE auto visit(const cutlass::Array<Accumulator, COUNT>& product, int part, int epi_m, int epi_n) {
      const auto of_subtile = coordinates(cute::_, cute::_, cute::_, epi_m, epi_n);
      using Layout = cute::remove_cvref_t<decltype(of_subtile.layout())>;
      static_assert(in_pairs<Layout>(cute::make_seq<cute::size(Layout{}) / 2>{}));
      const auto row_of = [&](int i) { return static_cast<int>(cute::get<0>(of_subtile(part * COUNT + i))); };
      const auto channel_of = [&](int i) { return static_cast<int>(cute::get<1>(of_subtile(part * COUNT + i))); };
      const int first_row = afresh(row_of(0));  // or where the rows of all subtiles lie would be kept
      cutlass::Array<float, COUNT> result;
      LLAVA_ST_UNROLL
      for (int i = 0; i < COUNT; i += 2) {
        // Outside of the matrix any numbers will do.
        const int row = cute::min(first_row + (row_of(i) - row_of(0)), rows - 1);
        const int channel = channel_of(i) < channels ? channel_of(i) : 0;
        float x[2] = {product[i], product[i + 1]};
        positions.at(row).template add_to<2>(x, channel);
        result[i] = x[0];
        result[i + 1] = x[1];
      }
      return result;
    }
  };

  template <bool REFERENCE_SOURCE, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const evt::detail::ConsumerStoreArgs<Args...>& args) {
    const auto [M, N, K, L] = args.problem_shape_mnkl;
    const auto coordinates = evt::detail::sm90_partition_for_epilogue<REFERENCE_SOURCE>(
        cute::make_identity_tensor(cute::make_shape(M, N, L)), args.tile_shape_mnk, args.tile_coord_mnkl, args.epi_tile,
        args.tiled_copy, args.thread_idx);
    return ConsumerStoreCallbacks<cute::remove_cvref_t<decltype(coordinates)>>(coordinates, M, N, params->positions);
  }
};

/// The GELU as CUTLASS calls it.
template <class Numbers>
struct GeluFunction {
  CUTLASS_DEVICE Numbers operator()(const Numbers& x) const {
    Numbers result;
    LLAVA_ST_UNROLL
    for (int i = 0; i < Numbers::kElements; ++i) result[i] = gelu(x[i]);
    return result;
  }
};

/// Of the accumulators and x: stores gelu(x), and hands on the product with gelu'(x). STORE is CUTLASS's node that
/// stores what it hands on.
template <class STORE>
struct GeluGradientNode90 : STORE {
  using STORE::STORE;

  template <class Stored>
  struct ConsumerStoreCallbacks : Stored {
    CUTLASS_DEVICE explicit ConsumerStoreCallbacks(Stored&& stored) : Stored(static_cast<Stored&&>(stored)) {}

    template <class Accumulator, class Input, int COUNT>
    CUTLASS_DEVICE auto visit(const cutlass::Array<Accumulator, COUNT>& product, int part, int epi_m, int epi_n,
                              const cutlass::Array<Input, COUNT>& x) {
      const cutlass::Array<float, COUNT> at = cutlass::NumericArrayConverter<float, Input, COUNT>{}(x);
      cutlass::Array<float, COUNT> gradient, activation;
      LLAVA_ST_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        const Gelu at_x = gelu_with_derivative(at[i]);
        activation[i] = at_x.value;
        gradient[i] = product[i] * at_x.derivative;
      }
      Stored::visit(product, part, epi_m, epi_n, activation);
      return gradient;
    }
  };

  template <bool REFERENCE_SOURCE, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const evt::detail::ConsumerStoreArgs<Args...>& args) {
    auto stored = STORE::template get_consumer_store_callbacks<REFERENCE_SOURCE>(args);
    return ConsumerStoreCallbacks<decltype(stored)>(static_cast<decltype(stored)&&>(stored));
  }
};

}  // namespace llava_st::cuda
