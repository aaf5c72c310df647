// From a call of lape_scatter to launches. Knows nothing of torch.
#pragma once

#include <algorithm>

#include "../operand.cuh"
#include "backward.cuh"
#include "forward.cuh"

namespace llava_st::cuda {

template <class T>
constexpr int scatter_elements() {
  return sizeof(Words) / sizeof(T);
}

/// Whether rows can be moved in packets of sixteen bytes.
template <class T>
bool in_vectors(const Rows<T>& rows) {
  return rows.stride % scatter_elements<T>() == 0 && aligned(rows.data, scatter_elements<T>());
}

template <class L>
void launch_scatter_in(const ScatterArguments<typename L::Element>& arguments, void* stream) {
  launch<lape_scatter_forward<L>>({smaller(arguments.tokens, max_blocks()), kScatterThreads, stream}, arguments);
}

template <class T>
void launch_lape_scatter(const ScatterArguments<T>& arguments, void* stream) {
  if (arguments.tokens == 0 || arguments.channels == 0) return;
  constexpr int elements = scatter_elements<T>();
  const bool vectors =
      arguments.channels % elements == 0 && in_vectors(arguments.embed) && in_vectors(arguments.visual);
  if (vectors) {
    launch_scatter_in<Packets<T, elements>>(arguments, stream);
  } else {
    launch_scatter_in<Packets<T, 1>>(arguments, stream);
  }
}

template <class L>
void launch_gather_in(const GatherArguments<typename L::Element>& arguments, void* stream) {
  const int64_t segments = arguments.entries / kSegment;
  if (segments > 0) {
    launch<lape_scatter_sum_segments<L>>({smaller(segments, max_blocks()), kGatherThreads, stream}, arguments);
  }
  const int64_t blocks = ceil_div(arguments.rows(), kRowsPerBlock);
  launch<lape_scatter_gather<L>>({smaller(blocks, max_blocks()), kGatherThreads, stream}, arguments);
}

/// All gradients are contiguous.
template <class T>
void launch_lape_scatter_backward(const GatherArguments<T>& arguments, void* stream) {
  if (arguments.channels == 0) return;
  constexpr int elements = scatter_elements<T>();
  if (arguments.channels % elements == 0 && in_vectors(arguments.gradient)) {
    launch_gather_in<Packets<T, elements>>(arguments, stream);
  } else {
    launch_gather_in<Packets<T, 1>>(arguments, stream);
  }
}

}  // namespace llava_st::cuda
