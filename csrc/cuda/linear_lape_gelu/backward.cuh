// What follows the matrix product of gelu_linear_gradient: the gradient of the activation becomes that of what went
// into the GELU, in place, and the activation is calculated again.
#pragma once

#include "../divisor.cuh"
#include "../row_packets.cuh"
#include "gelu.cuh"

namespace llava_st::cuda {

constexpr int kGradientThreads = 256;
constexpr int kTokensPerThread = 4;

template <class T>
struct GeluGradientArguments {
  T* gradient;             // `[tokens, N]`: of the activation, and then of the preactivation
  T* activation;           // `[tokens, N]`
  const T* preactivation;  // its rows are `stride` apart
  int64_t stride, tokens, channels;
  Divisor by_packets;
};

template <class L>
LLAVA_ST_DEVICE void finish_tokens(const GeluGradientArguments<typename L::Element>& arguments, int64_t first,
                                   int64_t channel) {
  using Packet = typename L::Packet;
  const int exist = afresh(static_cast<int>(smaller(arguments.tokens - first, kTokensPerThread)));
  const int64_t at = first * arguments.channels + channel;
  Packet preactivation[kTokensPerThread], gradient[kTokensPerThread];
  LLAVA_ST_UNROLL
  for (int i = 0; i < kTokensPerThread; ++i) {
    const auto* const from = arguments.preactivation + (first + i) * arguments.stride + channel;
    preactivation[i] = load_once(reinterpret_cast<const Packet*>(from), i < exist);
    const auto* const product = arguments.gradient + at + i * arguments.channels;
    gradient[i] = load_for_update(reinterpret_cast<const Packet*>(product), i < exist);
  }
  LLAVA_ST_UNROLL
  for (int i = 0; i < kTokensPerThread; ++i) {
    if (i >= exist) continue;
    Channels<L> x(preactivation[i]), grad(gradient[i]);
    LLAVA_ST_UNROLL
    for (int e = 0; e < L::ELEMENTS; ++e) {
      const Gelu at_x = gelu_with_derivative(x.of[e]);
      x.of[e] = at_x.value;
      grad.of[e] *= at_x.derivative;
    }
    const int64_t to = at + i * arguments.channels;
    store(reinterpret_cast<Packet*>(arguments.gradient + to), grad.packed());
    store(reinterpret_cast<Packet*>(arguments.activation + to), x.packed());
  }
}

template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kGradientThreads, 2)
    gelu_gradient(const GeluGradientArguments<typename L::Element> arguments) {
  const int64_t packets = arguments.by_packets.divisor;
  const int64_t count = ceil_div(arguments.tokens, kTokensPerThread) * packets;
  for (int64_t i = block_index() * kGradientThreads + thread_index(); i < count;
       i += block_count() * kGradientThreads) {
    const int64_t number = arguments.by_packets.quotient(i);
    finish_tokens<L>(arguments, number * kTokensPerThread, (i - number * packets) * L::ELEMENTS);
  }
}

}  // namespace llava_st::cuda
