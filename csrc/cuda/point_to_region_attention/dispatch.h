// From a problem to launches: which instantiation of a kernel runs, over how many blocks. Knows nothing of torch.
#pragma once

#include <algorithm>

#include "../packed_grids.cuh"
#include "backward.cuh"
#include "forward.cuh"
#include "packed.cuh"

namespace llava_st::cuda {

/// Strides in elements, where those of dimensions with at most one entry do not count.
inline TokenStrides strides_that_count(const int64_t* sizes, const int64_t* strides, bool packed) {
  const auto stride = [&](int dim) { return sizes[dim] > 1 ? strides[dim] : 0; };
  if (packed) return {0, 0, 0, stride(0), stride(1)};
  return {stride(0), stride(1), stride(2), stride(3), stride(4)};
}

inline Extent clip(Extent region, Extent grid) {
  return {smaller(region.t, grid.t), smaller(region.h, grid.h), smaller(region.w, grid.w)};
}

/// Places in a region are counted in 32 bits along each axis.
inline bool fits_places(Extent region) {
  constexpr int64_t limit = int64_t{1} << 31;
  return region.t < limit && region.h < limit && region.w < limit;
}

/// What a problem over a dense batch says of its regions and heads.
template <class Problem>
Problem dense_batch(int64_t samples, Extent grid, Extent region, int64_t heads) {
  Problem problem = {};
  const Extent regions = regions_of(grid, region);
  problem.queries = samples * regions.count();
  problem.heads = heads;
  problem.by_heads = Divisor(heads);
  problem.by_regions = Divisor(regions.count());
  problem.by_regions_h = Divisor(regions.h);
  problem.by_regions_w = Divisor(regions.w);
  problem.region = clip(region, grid);
  problem.grid = grid;
  return problem;
}

inline AttentionProblem dense_problem(int64_t samples, Extent grid, Extent region, int64_t heads, int64_t head_dim,
                                      int64_t value_dim, double scale) {
  auto problem = dense_batch<AttentionProblem>(samples, grid, region, heads);
  problem.head_dim = static_cast<int>(head_dim);
  problem.value_dim = static_cast<int>(value_dim);
  problem.scale = static_cast<float>(scale);
  return problem;
}

/// No video is longer than `longest` along any axis, or has more tokens than exist.
inline AttentionProblem packed_problem(int64_t queries, const PackedVideos& videos, Extent longest, Extent region,
                                       int64_t heads, int64_t head_dim, int64_t value_dim, double scale) {
  // A region longer than all videos is as good as one as long as they are, and cannot overflow.
  const auto shorten = [&](int64_t size, int64_t most) { return smaller(size, std::max<int64_t>(most, 1)); };
  AttentionProblem problem = {};
  problem.queries = queries;
  problem.heads = heads;
  problem.by_heads = Divisor(heads);
  problem.head_dim = static_cast<int>(head_dim);
  problem.value_dim = static_cast<int>(value_dim);
  problem.scale = static_cast<float>(scale);
  problem.region = {shorten(region.t, longest.t), shorten(region.h, longest.h), shorten(region.w, longest.w)};
  problem.offsets = videos.offsets;
  problem.grids = videos.grids;
  problem.videos = videos.videos;
  problem.keys = videos.tokens;
  return problem;
}

/// No region of the problem has more keys.
inline int64_t most_keys(const AttentionProblem& problem) {
  if (!problem.packed()) return problem.region.count();
  int64_t keys = 1;
  for (const int64_t size : {problem.region.t, problem.region.h, problem.region.w}) {
    keys = keys > problem.keys / size ? problem.keys : keys * size;
  }
  return keys;
}

/// Whether all rows can be read in vectors of sixteen bytes.
template <class T>
bool aligned(const T* data) {
  return aligned(data, sizeof(Words) / sizeof(T));
}

template <class T>
bool aligned(const Operand<T>& operand) {
  return aligned(operand, sizeof(Words) / sizeof(T));
}

/// Keys in a chunk: nine, those of LLaVA-ST's spatial regions, or the next multiple of the groups.
constexpr int chunk_steps(int lanes) { return (9 * lanes + kWarpSize - 1) / kWarpSize; }

/// The widest row whose layouts hold a chunk of several keys in registers, and the widest that there is.
constexpr int kWideRow = 256, kWidestRow = 1152;

/// Rows that a layout is chosen for. `vectors`: all of them can be read in vectors of sixteen bytes.
struct RowShape {
  int key, value;  // elements
  bool vectors, biased;

  int widest() const { return std::max(key, value); }
};

/// Calls `visit` with the layout for rows like these and regions of at most `keys` keys.
template <class T, class Visit>
void with_layout(const RowShape& rows, int64_t keys, const Visit& visit) {
  constexpr int elements = sizeof(Words) / sizeof(T);
  const bool extended = rows.biased || rows.key != rows.value;
  const auto choose = [&](auto few, auto many) {
    const auto extend = [&](auto layout) { extended ? visit(Extended<decltype(layout)>{}) : visit(layout); };
    keys <= few.CHUNK ? extend(few) : extend(many);
  };
  const bool vectors = rows.vectors && rows.key % elements == 0 && rows.value % elements == 0;
  const int width = rows.widest();
  if (width > kWideRow) {  // one key at a time
    constexpr int packets = (kWidestRow + 32 * elements - 1) / (32 * elements);
    vectors ? visit(Extended<Layout<T, elements, 32, packets, 1, true>>{})
            : visit(Extended<Layout<T, 1, 32, kWidestRow / 32, 1, true>>{});
  } else if (!vectors) {
    choose(Layout<T, 1, 32, 8, 3, false>{}, Layout<T, 1, 32, 8, 3, true>{});
  } else if (width <= 8 * elements) {
    choose(Layout<T, elements, 8, 1, chunk_steps(8), false>{}, Layout<T, elements, 8, 1, chunk_steps(8), true>{});
  } else if (width <= 16 * elements) {
    choose(Layout<T, elements, 16, 1, chunk_steps(16), false>{}, Layout<T, elements, 16, 1, chunk_steps(16), true>{});
  } else if (width <= 32 * elements) {
    choose(Layout<T, elements, 32, 1, chunk_steps(32), false>{}, Layout<T, elements, 32, 1, chunk_steps(32), true>{});
  } else if constexpr (elements == 4) {
    choose(Layout<T, elements, 32, 2, chunk_steps(32), false>{}, Layout<T, elements, 32, 2, chunk_steps(32), true>{});
  }
}

inline LaunchShape attention_shape(const AttentionProblem& problem, void* stream) {
  const int64_t blocks = ceil_div(problem.queries * problem.heads, kBlockWarps);
  return {smaller(blocks, max_blocks()), kBlockThreads, stream};
}

/// Launches the forward kernel; an empty problem launches nothing.
template <class T>
void launch_forward(const ForwardArguments<T>& arguments, void* stream) {
  const AttentionProblem& problem = arguments.problem;
  const LaunchShape shape = attention_shape(problem, stream);
  if (shape.blocks == 0 || problem.value_dim == 0) return;
  const bool vectors =
      aligned(arguments.query) && aligned(arguments.key) && aligned(arguments.value) && aligned(arguments.output);
  const RowShape rows = {problem.head_dim, problem.value_dim, vectors, arguments.bias.data != nullptr};
  with_layout<T>(rows, most_keys(problem),
                 [&](auto layout) { launch<attention_forward<decltype(layout)>>(shape, arguments); });
}

/// Launches the backward kernels.
template <class T>
void launch_backward(const BackwardArguments<T>& arguments, void* stream) {
  const AttentionProblem& problem = arguments.problem;
  if (problem.heads == 0 || std::max(problem.head_dim, problem.value_dim) == 0) return;
  const LaunchShape shape = attention_shape(problem, stream);
  if (shape.blocks > 0) {
    const bool vectors = aligned(arguments.grad_output) && aligned(arguments.query) && aligned(arguments.key) &&
                         aligned(arguments.value) && aligned(arguments.grad_query) && aligned(arguments.grad_key) &&
                         aligned(arguments.grad_value);
    const RowShape rows = {problem.head_dim, problem.value_dim, vectors, arguments.bias.data != nullptr};
    with_layout<T>(rows, most_keys(problem),
                   [&](auto layout) { launch<attention_backward<decltype(layout)>>(shape, arguments); });
  }
  if (problem.packed() && problem.keys > 0) {
    constexpr int64_t enough = 1024;  // usually these blocks find that they have nothing to do
    launch<zero_keys_without_query<T>>({smaller(problem.keys, enough), kBlockThreads, stream}, problem,
                                       arguments.grad_key.data, arguments.grad_value.data, arguments.grad_bias.data);
  }
}

}  // namespace llava_st::cuda
