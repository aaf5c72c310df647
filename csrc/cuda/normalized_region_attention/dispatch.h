// From a problem of normalized region attention to launches. Knows nothing of torch.
#pragma once

#include "../point_to_region_attention/dispatch.h"
#include "backward.cuh"
#include "forward.cuh"
#include "tile_backward.cuh"
#include "tile_forward.cuh"

namespace llava_st::cuda {

/// Channels are counted in 32 bits, with room for those that a block takes at once.
constexpr int64_t kMostChannels = int64_t{1} << 30;

inline NormalizedProblem normalized_problem(int64_t samples, Extent grid, Extent region, int64_t heads, int64_t width,
                                            double eps) {
  auto problem = dense_batch<NormalizedProblem>(samples, grid, region, heads);
  problem.width = static_cast<int>(width);
  problem.eps = static_cast<float>(eps);
  return problem;
}

inline int64_t rows_of(const NormalizedProblem& problem) { return problem.queries * problem.heads; }

/// Calls `visit` with how general kernels move rows: sixteen bytes at once, or single elements.
template <class T, class Visit>
void with_packets(bool vectors, const Visit& visit) {
  if (vectors) {
    visit(Packets<T, sizeof(Words) / sizeof(T)>{});
  } else {
    visit(Packets<T, 1>{});
  }
}

template <class T>
bool in_vectors(const NormalizedForwardArguments<T>& arguments) {
  constexpr int elements = sizeof(Words) / sizeof(T);
  return arguments.problem.width % elements == 0 && aligned(arguments.query) && aligned(arguments.key) &&
         aligned(arguments.value) && aligned(arguments.output);
}

template <class T>
bool in_vectors(const NormalizedBackwardArguments<T>& arguments) {
  const NormalizedForwardArguments<T> inputs = {arguments.problem, arguments.query, arguments.key, arguments.value,
                                                arguments.grad_query};
  return in_vectors(inputs) && aligned(arguments.grad_output) && aligned(arguments.grad_key) &&
         aligned(arguments.grad_value);
}

/// Whether the tensor cores take a problem: rows of 16-bit elements in vectors, not too wide for a block to hold, and
/// regions that fit one matrix product.
inline bool fits_tile(const NormalizedProblem& problem, bool vectors) {
  return vectors && problem.width <= kMostWarps * kSliceChannels && problem.region.count() <= kTileRows;
}

/// A block per region, and a warp for each of its slices.
inline LaunchShape tile_shape(const NormalizedProblem& problem, void* stream) {
  const int64_t warps = ceil_div(problem.width, kSliceChannels);
  return {smaller(problem.queries, max_blocks()), static_cast<int>(warps) * kWarpSize, stream};
}

/// Launches the forward kernel; an empty problem launches nothing.
template <class T>
void launch_normalized_forward(const NormalizedForwardArguments<T>& arguments, void* stream) {
  const int64_t rows = rows_of(arguments.problem);
  if (rows == 0) return;
  const bool vectors = in_vectors(arguments);
  if constexpr (sizeof(T) == 2) {
    if (fits_tile(arguments.problem, vectors)) {
      return launch<normalized_tile_forward<T>>(tile_shape(arguments.problem, stream), arguments);
    }
  }
  with_packets<T>(vectors, [&](auto packets) {
    launch<normalized_forward<decltype(packets)>>({smaller(rows, max_blocks()), kRowThreads, stream}, arguments);
  });
}

/// Launches the backward kernels. Without heads there are still tokens, and their gradients are zero.
template <class T>
void launch_normalized_backward(const NormalizedBackwardArguments<T>& arguments, int64_t tokens, void* stream) {
  const int64_t rows = rows_of(arguments.problem);
  const bool vectors = in_vectors(arguments);
  if constexpr (sizeof(T) == 2) {
    if (rows > 0 && arguments.problem.heads <= kMostTileHeads && fits_tile(arguments.problem, vectors)) {
      return launch<normalized_tile_backward<T>>(tile_shape(arguments.problem, stream), arguments);
    }
  }
  with_packets<T>(vectors, [&](auto packets) {
    using L = decltype(packets);
    if (rows > 0) {
      launch<normalized_query_gradient<L>>({smaller(rows, max_blocks()), kRowThreads, stream}, arguments);
    }
    if (tokens > 0) {
      launch<normalized_token_gradients<L>>({smaller(tokens, max_blocks()), kRowThreads, stream}, arguments, tokens);
    }
  });
}

}  // namespace llava_st::cuda
