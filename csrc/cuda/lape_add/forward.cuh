// lape_add, forward: features + the interpolated rows of height, width and time. Features are read once.
//
// A thread holds the rows of a tile's frames and columns in registers and walks down the tile; what it needs then for
// the tokens of several frames and columns is one row of the height, which mostly comes from the L2 cache.
#pragma once

#include "tables.cuh"
#include "tiles.cuh"

namespace llava_st::cuda {

constexpr int kAddThreads = 128;
constexpr int kAddFrames = 2, kAddColumns = 3;  // of a tile: so many loads in flight per thread

template <class T>
struct AddArguments {
  Tiling tiling;
  Operand<const T> features;
  Operand<T> output;  // which may be the features
  FloatTable temporal, height, width;
};

/// ((x + h) + w) + t. With ROUND every sum is rounded to the dtype of the elements.
template <class L, bool ROUND>
LLAVA_ST_DEVICE typename L::Packet sum_of_rows(const typename L::Packet& x, const Channels<L>& h, const Channels<L>& w,
                                               const Channels<L>& t) {
  Channels<L> sum(x);
  sum.add(h);
  if constexpr (ROUND) sum = sum.rounded();
  sum.add(w);
  if constexpr (ROUND) sum = sum.rounded();
  sum.add(t);
  return sum.packed();
}

/// A row of a table as it is added.
template <class L, bool ROUND>
LLAVA_ST_DEVICE Channels<L> position(const FloatTable& table, int64_t i, int64_t size, int64_t channel) {
  const Channels<L> row = row_of_patch<L>(table, i, size, channel);
  return ROUND ? row.rounded() : row;
}

template <class L, bool ROUND>
LLAVA_ST_DEVICE void add_to_tile(const AddArguments<typename L::Element>& arguments, const Tile& tile,
                                 int64_t channel) {
  using T = typename L::Element;
  using Packet = typename L::Packet;
  const TileRows<const T> features = rows_of(arguments.tiling, tile, arguments.features, channel);
  const TileRows<T> output = rows_of(arguments.tiling, tile, arguments.output, channel);
  const T* from[kAddFrames];
  T* to[kAddFrames];
  Channels<L> t[kAddFrames], w[kAddColumns];
  int64_t frame = tile.frame, samples = 0;
  LLAVA_ST_UNROLL
  for (int f = 0; f < kAddFrames; ++f) {
    from[f] = features.at(f, 0, 0, samples);
    to[f] = output.at(f, 0, 0, samples);
    t[f] = position<L, ROUND>(arguments.temporal, frame, tile.grid.t, channel);
    if (++frame == tile.grid.t) {
      frame = 0;
      ++samples;
    }
  }
  LLAVA_ST_UNROLL
  for (int c = 0; c < kAddColumns; ++c) {
    const int64_t column = smaller(tile.first.w + c, tile.grid.w - 1);  // any will do where there is none
    w[c] = position<L, ROUND>(arguments.width, column, tile.grid.w, channel);
  }

  for (int row = 0; row < tile.rows; ++row) {
    const int frames = afresh(tile.frames), columns = afresh(tile.columns);
    Packet x[kAddFrames][kAddColumns];
    LLAVA_ST_UNROLL
    for (int f = 0; f < kAddFrames; ++f) {
      LLAVA_ST_UNROLL
      for (int c = 0; c < kAddColumns; ++c) {
        const auto* const at = reinterpret_cast<const Packet*>(from[f] + c * features.column);
        x[f][c] = load_for_update(at, f < frames && c < columns);
      }
      from[f] += features.row;
    }
    const Channels<L> h = position<L, ROUND>(arguments.height, tile.first.h + row, tile.grid.h, channel);
    LLAVA_ST_UNROLL
    for (int f = 0; f < kAddFrames; ++f) {
      LLAVA_ST_UNROLL
      for (int c = 0; c < kAddColumns; ++c) {
        if (f >= frames || c >= columns) continue;
        auto* const at = reinterpret_cast<Packet*>(to[f] + c * output.column);
        store_streaming(at, sum_of_rows<L, ROUND>(x[f][c], h, w[c], t[f]));
      }
      to[f] += output.row;
    }
  }
}

/// The same one by one, where only some of the tokens exist.
template <class L, bool ROUND>
LLAVA_ST_DEVICE void add_to_tokens(const AddArguments<typename L::Element>& arguments, const Tile& tile,
                                   int64_t channel) {
  using T = typename L::Element;
  using Packet = typename L::Packet;
  const TileRows<const T> features = packed_rows(tile, arguments.features, channel);
  const TileRows<T> output = packed_rows(tile, arguments.output, channel);
  for (int i = 0; i < tile.frames * tile.rows * tile.columns; ++i) {
    const int line = i / tile.columns, c = i - line * tile.columns;
    const int f = line / tile.rows, row = line - f * tile.rows;
    if (token_number(tile, f, row, c) >= arguments.tiling.videos.tokens) return;
    const auto x = load_for_update(reinterpret_cast<const Packet*>(features.at(f, row, c)), true);
    const auto t = position<L, ROUND>(arguments.temporal, tile.first.t + f, tile.grid.t, channel);
    const auto h = position<L, ROUND>(arguments.height, tile.first.h + row, tile.grid.h, channel);
    const auto w = position<L, ROUND>(arguments.width, tile.first.w + c, tile.grid.w, channel);
    store_streaming(reinterpret_cast<Packet*>(output.at(f, row, c)), sum_of_rows<L, ROUND>(x, h, w, t));
  }
}

template <class L, bool ROUND>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kAddThreads, 4)
    lape_add_forward(const AddArguments<typename L::Element> arguments) {
  const Tiling& tiling = arguments.tiling;
  const int64_t packets = tiling.by_packets.divisor;
  const int64_t count = tile_count(tiling) * packets;
  for (int64_t i = block_index() * kAddThreads + thread_index(); i < count; i += block_count() * kAddThreads) {
    const int64_t number = tiling.by_packets.quotient(i);
    const int64_t channel = (i - number * packets) * L::ELEMENTS;
    const Tile tile = tile_at(tiling, number);
    if (cut_short(tiling, tile)) {
      add_to_tokens<L, ROUND>(arguments, tile, channel);
    } else {
      add_to_tile<L, ROUND>(arguments, tile, channel);
    }
  }
}

/// Copies the features of tokens past the last video. With grids that add up there are none.
template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kAddThreads, 1)
    lape_add_keep_rest(const AddArguments<typename L::Element> arguments) {
  using Packet = typename L::Packet;
  const PackedVideos& videos = arguments.tiling.videos;
  const int64_t packets = arguments.tiling.by_packets.divisor;
  for (int64_t token = videos.offsets[videos.videos].key + block_index(); token < videos.tokens;
       token += block_count()) {
    const auto* from = reinterpret_cast<const Packet*>(arguments.features.data + token * arguments.features.strides.w);
    auto* to = reinterpret_cast<Packet*>(arguments.output.data + token * arguments.output.strides.w);
    for (int64_t i = thread_index(); i < packets; i += kAddThreads) {
      store_streaming(to + i, load_for_update(from + i, true));
    }
  }
}

}  // namespace llava_st::cuda
