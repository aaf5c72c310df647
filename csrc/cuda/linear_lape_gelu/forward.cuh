// What follows the matrix product of linear_lape_gelu: bias and positions are added, and the GELU is taken. The product
// is read once and written over.
//
// A thread holds bias, time and height of a few channels in registers and walks along a row of patches; what it needs
// then for each is a row of the width, which mostly comes from the L1 cache.
#pragma once

#include "../divisor.cuh"
#include "../row_packets.cuh"
#include "gelu.cuh"

namespace llava_st::cuda {

constexpr int kGeluThreads = 256;
constexpr int kPatchesInFlight = 4;  // so many loads per thread

template <class T>
struct PositionGeluArguments {
  const T* product;  // `[samples, T, H, W, N]`, as are the results; one of them is the same memory
  T* preactivation;  // null where it is not kept
  T* activation;
  const float *bias, *temporal, *height, *width;  // contiguous: `[N]` and a row for every frame, row and column
  int64_t channels, columns;                      // of the product: N and W
  int64_t lines, run;                             // rows of patches in all samples; patches of such a row per thread
  Divisor by_packets, by_runs, by_rows, by_frames;
};

template <class L>
LLAVA_ST_DEVICE void finish_run(const PositionGeluArguments<typename L::Element>& arguments, int64_t line,
                                int64_t first, int64_t channel) {
  using Packet = typename L::Packet;
  const int64_t channels = arguments.channels;
  const int64_t frame = arguments.by_rows.quotient(line), row = line - frame * arguments.by_rows.divisor;
  const int64_t time = frame - arguments.by_frames.quotient(frame) * arguments.by_frames.divisor;
  Channels<L> position = load_floats<L>(arguments.bias + channel);
  position.add(load_floats<L>(arguments.temporal + time * channels + channel));
  position.add(load_floats<L>(arguments.height + row * channels + channel));

  const int64_t end = smaller(first + arguments.run, arguments.columns);
  const float* width = arguments.width + first * channels + channel;
  int64_t at = (line * arguments.columns + first) * channels + channel;
  for (int64_t column = first; column < end; column += kPatchesInFlight) {
    const int exist = afresh(static_cast<int>(smaller(end - column, kPatchesInFlight)));
    Packet product[kPatchesInFlight];
    LLAVA_ST_UNROLL
    for (int i = 0; i < kPatchesInFlight; ++i) {
      const auto* const from = reinterpret_cast<const Packet*>(arguments.product + at + i * channels);
      product[i] = load_for_update(from, i < exist);
    }
    LLAVA_ST_UNROLL
    for (int i = 0; i < kPatchesInFlight; ++i) {
      if (i >= exist) continue;
      Channels<L> x = load_floats<L>(width + i * channels);
      x.add(position);
      x.add(Channels<L>(product[i]));
      const int64_t to = at + i * channels;
      if (arguments.preactivation != nullptr) {  // not read before the backward pass
        store_streaming(reinterpret_cast<Packet*>(arguments.preactivation + to), x.packed());
      }
      LLAVA_ST_UNROLL
      for (int e = 0; e < L::ELEMENTS; ++e) x.of[e] = gelu(x.of[e]);
      store(reinterpret_cast<Packet*>(arguments.activation + to), x.packed());
    }
    width += kPatchesInFlight * channels;
    at += kPatchesInFlight * channels;
  }
}

template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kGeluThreads, 2)
    position_gelu(const PositionGeluArguments<typename L::Element> arguments) {
  const int64_t packets = arguments.by_packets.divisor, runs = arguments.by_runs.divisor;
  const int64_t count = arguments.lines * runs * packets;
  for (int64_t i = block_index() * kGeluThreads + thread_index(); i < count; i += block_count() * kGeluThreads) {
    const int64_t number = arguments.by_packets.quotient(i), line = arguments.by_runs.quotient(number);
    finish_run<L>(arguments, line, (number - line * runs) * arguments.run, (i - number * packets) * L::ELEMENTS);
  }
}

}  // namespace llava_st::cuda
