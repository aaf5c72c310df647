// From a call of lape_add to launches: tiles, layouts, how many blocks. Knows nothing of torch.
#pragma once

#include <algorithm>

#include "backward.cuh"
#include "finish_tables.cuh"
#include "forward.cuh"

namespace llava_st::cuda {

/// So many blocks keep the memory of a large GPU busy; beyond them, tiles rather grow.
constexpr int64_t kAddBlocksWanted = 1024, kSumBlocksWanted = 256;
constexpr int64_t kMostAddRows = 9;  // of a tile: with more of them, too few tiles are left at the end of a launch
/// Blocks for a packed batch of which the host does not know how many tiles it has: enough for any GPU.
constexpr int64_t kPackedBlocks = 4096;

/// How many rows a tile, of so many tokens each, has for there to be as many threads as wanted.
inline int64_t rows_of_tile(int64_t tokens, int64_t packets, int64_t tokens_per_row, int64_t threads, int64_t most) {
  return std::clamp<int64_t>(tokens * packets / (tokens_per_row * threads), 1, std::max<int64_t>(most, 1));
}

inline int64_t rows_to_add(int64_t tokens, int64_t packets, int64_t most) {
  const int64_t threads = smaller(kAddBlocksWanted, max_blocks()) * kAddThreads;
  return rows_of_tile(tokens, packets, kAddFrames * kAddColumns, threads, smaller(most, kMostAddRows));
}

inline int64_t rows_to_sum(int64_t tokens, int64_t packets, int64_t most) {
  const int64_t threads = smaller(kSumBlocksWanted, max_blocks()) * kSumThreads;
  return rows_of_tile(tokens, packets, kSumFrames * kSumColumns, threads, most);
}

/// A dense batch of samples with `grid` tokens each.
inline Tiling dense_tiling(int64_t samples, Extent grid, int64_t channels, int64_t packets, Extent tile) {
  Tiling tiling = {};
  const int64_t rows = ceil_div(grid.h, ceil_div(grid.h, tile.h));  // tiles as alike as can be
  tiling.tile = {tile.t, std::max<int64_t>(rows, 1), tile.w};
  tiling.channels = channels;
  tiling.by_packets = Divisor(packets);
  tiling.grid = {samples * grid.t, grid.h, grid.w};
  tiling.by_frames = Divisor(grid.t);
  const Extent tiles = regions_of(tiling.grid, tiling.tile);
  tiling.by_tiles_h = Divisor(tiles.h);
  tiling.by_tiles_w = Divisor(tiles.w);
  tiling.tiles = tiles.count();
  return tiling;
}

/// A packed batch of at most `tiles` tiles.
inline Tiling packed_tiling(const PackedVideos& videos, int64_t tiles, int64_t channels, int64_t packets, Extent tile) {
  Tiling tiling = {};
  tiling.tile = tile;
  tiling.channels = channels;
  tiling.by_packets = Divisor(packets);
  tiling.tiles = tiles;
  tiling.videos = videos;
  return tiling;
}

inline LaunchShape shape_for(int64_t threads, int threads_per_block, int64_t most_blocks, void* stream) {
  const int64_t blocks = smaller(ceil_div(threads, threads_per_block), most_blocks);
  return {smaller(blocks, max_blocks()), threads_per_block, stream};
}

constexpr int64_t kAnyNumberOfBlocks = INT64_MAX;

template <class T>
void launch_resize(const ResizeArguments<T>& arguments, void* stream) {
  const int64_t rows = arguments.temporal.size + arguments.height.size + arguments.width.size;
  if (rows * arguments.channels == 0) return;
  launch<resize_tables<T>>(shape_for(rows * arguments.channels, kTableThreads, kAnyNumberOfBlocks, stream), arguments);
}

/// Channels of a thread: sixteen bytes in the forward pass, eight in the backward pass, whose sums need registers.
template <class T>
constexpr int add_elements() {
  return sizeof(Words) / sizeof(T);
}
template <class T>
constexpr int sum_elements() {
  return sizeof(WordPair) / sizeof(T);
}

/// Whether lape_add can read and write packets of so many elements.
template <class T>
bool in_packets(const Operand<T>& operand, int64_t channels, int elements) {
  return channels % elements == 0 && aligned(operand, elements);
}

/// `grids_on_device`: only there it is known how many tiles and tokens the videos have.
template <class L>
void launch_forward_in(const AddArguments<typename L::Element>& arguments, bool round, bool grids_on_device,
                       void* stream) {
  const Tiling& tiling = arguments.tiling;
  const LaunchShape shape = shape_for(tiling.tiles * tiling.by_packets.divisor, kAddThreads,
                                      grids_on_device ? kPackedBlocks : kAnyNumberOfBlocks, stream);
  if (shape.blocks == 0) return;
  if constexpr (sizeof(typename L::Element) < sizeof(float)) {  // others are not rounded
    if (round) {
      launch<lape_add_forward<L, true>>(shape, arguments);
    } else {
      launch<lape_add_forward<L, false>>(shape, arguments);
    }
  } else {
    launch<lape_add_forward<L, false>>(shape, arguments);
  }
  if (grids_on_device) {
    constexpr int64_t enough = 1024;  // usually these blocks find that they have nothing to do
    launch<lape_add_keep_rest<L>>({smaller(smaller(tiling.videos.tokens, enough), max_blocks()), kAddThreads, stream},
                                  arguments);
  }
}

/// The tiling's packets must be those of the layout: `vectors` is whether it has them, see in_packets.
template <class T>
void launch_lape_add(const AddArguments<T>& arguments, bool vectors, bool round, bool grids_on_device, void* stream) {
  if (vectors) {
    launch_forward_in<Packets<T, add_elements<T>()>>(arguments, round, grids_on_device, stream);
  } else {
    launch_forward_in<Packets<T, 1>>(arguments, round, grids_on_device, stream);
  }
}

template <class L>
void launch_sums_in(const SumArguments<typename L::Element>& arguments, void* stream) {
  const Tiling& tiling = arguments.tiling;
  const int64_t packets = tiling.by_packets.divisor;
  if (packets == 0) return;
  if (tiling.packed()) {
    if (arguments.slices == 0) return;
    launch<lape_add_sum_slices<L>>(shape_for(arguments.slices * packets, kSliceThreads, kAnyNumberOfBlocks, stream),
                                   arguments);
  } else {
    if (tiling.tiles == 0) return;
    launch<lape_add_sum_tiles<L>>(shape_for(tiling.tiles * packets, kSumThreads, kAnyNumberOfBlocks, stream),
                                  arguments);
  }
}

template <class T>
void launch_lape_add_sums(const SumArguments<T>& arguments, bool vectors, void* stream) {
  if (vectors) {
    launch_sums_in<Packets<T, sum_elements<T>()>>(arguments, stream);
  } else {
    launch_sums_in<Packets<T, 1>>(arguments, stream);
  }
}

template <class L>
void launch_finish_in(FinishArguments<typename L::Element> arguments, void* stream) {
  const int64_t chunks = ceil_div(arguments.channels, kWarpSize * L::ELEMENTS);
  arguments.by_chunks = Divisor(chunks);
  const int64_t anchors = arguments.temporal.count + arguments.height.count + arguments.width.count;
  launch<lape_add_finish<L>>({smaller(anchors * chunks, max_blocks()), kFinishThreads, stream}, arguments);
}

/// The sums and the gradients are contiguous.
template <class T>
void launch_lape_add_finish(const FinishArguments<T>& arguments, void* stream) {
  if (arguments.channels % 4 == 0) {
    launch_finish_in<Packets<T, 4>>(arguments, stream);
  } else {
    launch_finish_in<Packets<T, 1>>(arguments, stream);
  }
}

}  // namespace llava_st::cuda
