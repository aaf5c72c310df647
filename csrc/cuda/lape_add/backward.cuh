// lape_add, backward: the gradient of each table is that of the rows it gave, and those are sums over the tokens that
// share a frame, a row or a column. The gradient of the result is read once.
//
// A thread walks down a tile with the sums of its frames and columns in registers. Where the sums of a tile go depends:
// - dense: each tile has rows of its own in scratch memory, about 5 % of what is read. finish_tables.cuh adds them up
//   and hands the sums of patches on to the anchors.
// - packed: the sizes of videos, and so the number of such rows, are only known on the device. A few slices take the
//   tiles in turn; each adds to tables of its own, in order, what the sums of a tile mean for the anchors, and in the
//   end finish_tables.cuh adds up the slices.
// So every sum has one writer and one order.
#pragma once

#include "tables.cuh"
#include "tiles.cuh"

namespace llava_st::cuda {

constexpr int kSumThreads = 128;
constexpr int kSumFrames = 8, kSumColumns = 8;  // of a tile
constexpr int kSliceThreads = 64;
constexpr int kSliceRows = 16;  // of a tile of a packed batch

/// The sums over a tile's frames and columns. Two frames' loads of a row are under way at the same time.
template <class L>
struct TileSums {
  using T = typename L::Element;
  static constexpr int FRAMES_IN_FLIGHT = 2;
  static_assert(kSumFrames % FRAMES_IN_FLIGHT == 0);

  Channels<L> frame[kSumFrames], column[kSumColumns];

  /// Takes in one row of the tile, in all frames, and returns the sum over it. `columns(f)` of frame f exist.
  template <class Columns>
  LLAVA_ST_DEVICE Channels<L> add_row(const TileRows<const T>& gradient, int row, const Columns& columns) {
    Channels<L> sum;
    const T* from = gradient.at(0, row, 0);
    LLAVA_ST_UNROLL
    for (int first = 0; first < kSumFrames; first += FRAMES_IN_FLIGHT) {
      typename L::Packet x[FRAMES_IN_FLIGHT][kSumColumns];
      LLAVA_ST_UNROLL
      for (int f = 0; f < FRAMES_IN_FLIGHT; ++f) {
        const int exist = afresh(columns(first + f));
        LLAVA_ST_UNROLL
        for (int c = 0; c < kSumColumns; ++c) {
          x[f][c] = load_once(reinterpret_cast<const typename L::Packet*>(from + c * gradient.column), c < exist);
        }
        from += gradient.frame;
        if constexpr (L::ELEMENTS == 1) from = settled(from);  // or the addresses of all frames would be kept
      }
      LLAVA_ST_UNROLL
      for (int f = 0; f < FRAMES_IN_FLIGHT; ++f) {
        Channels<L> of_frame;
        LLAVA_ST_UNROLL
        for (int c = 0; c < kSumColumns; ++c) {
          const Channels<L> one(x[f][c]);
          of_frame.add(one);
          column[c].add(one);
        }
        frame[first + f].add(of_frame);
        sum.add(of_frame);
      }
    }
    return sum;
  }
};

template <class T>
struct SumArguments {
  Tiling tiling;
  Operand<const T> gradient;

  // Dense: sums of patches, `[slices, patches, C]` for each axis.
  float *frames, *rows, *columns;

  // Packed: sums of anchors, `[slices, temporal + height + width, C]`.
  float* anchors;
  int64_t slices;
  int64_t temporal, height, width;
  Alignment spatial;
};

/// Writes the sums of one tile. The tiles that share, say, a frame are numbered through, and each has a slice for it.
template <class L>
LLAVA_ST_DEVICE void sum_tile(const SumArguments<typename L::Element>& arguments, const Tile& tile, int64_t channel) {
  const Tiling& tiling = arguments.tiling;
  const int64_t tiles_h = tiling.by_tiles_h.divisor, tiles_w = tiling.by_tiles_w.divisor;
  const auto place = [&](float* sums, int64_t slice, int64_t patches, int64_t patch) {
    return sums + (slice * patches + patch) * tiling.channels + channel;
  };
  TileSums<L> sums;
  const TileRows<const typename L::Element> gradient = dense_rows(tile, arguments.gradient, channel);
  float* to = place(arguments.rows, tile.at.t * tiles_w + tile.at.w, tiling.grid.h, tile.first.h);
  for (int row = 0; row < tile.rows; ++row, to += tiling.channels) {
    store_floats<L>(to, sums.add_row(gradient, row, [&](int f) { return f < tile.frames ? tile.columns : 0; }));
  }
  to = place(arguments.frames, tile.at.h * tiles_w + tile.at.w, tiling.grid.t, tile.first.t);
  LLAVA_ST_UNROLL
  for (int f = 0; f < kSumFrames; ++f) {
    if (f < tile.frames) store_floats<L>(to + f * tiling.channels, sums.frame[f]);
  }
  to = place(arguments.columns, tile.at.t * tiles_h + tile.at.h, tiling.grid.w, tile.first.w);
  LLAVA_ST_UNROLL
  for (int c = 0; c < kSumColumns; ++c) {
    if (c < tile.columns) store_floats<L>(to + c * tiling.channels, sums.column[c]);
  }
}

template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kSumThreads, 3)
    lape_add_sum_tiles(const SumArguments<typename L::Element> arguments) {
  const Tiling& tiling = arguments.tiling;
  const int64_t packets = tiling.by_packets.divisor;
  const int64_t count = tiling.tiles * packets;
  for (int64_t i = block_index() * kSumThreads + thread_index(); i < count; i += block_count() * kSumThreads) {
    const int64_t number = tiling.by_packets.quotient(i);
    sum_tile<L>(arguments, dense_tile(tiling, number), (i - number * packets) * L::ELEMENTS);
  }
}

/// Of a row of a tile that is cut short.
LLAVA_ST_DEVICE int columns_that_exist(const Tiling& tiling, const Tile& tile, int frame, int row) {
  const int64_t left = tiling.videos.tokens - token_number(tile, frame, row, 0);
  return left < 0 ? 0 : static_cast<int>(smaller(left, tile.columns));
}

/// Adds a share of `sum` to what this thread has for an anchor.
template <class L>
LLAVA_ST_DEVICE void add_to_anchor(float* anchor, float share, const Channels<L>& sum) {
  Channels<L> total = load_own_floats<L>(anchor);
  total.add(share, sum);
  store_floats<L>(anchor, total);
}

/// The sums of one tile's frames, columns and rows, a column of shared memory per thread: so that what is done with
/// them is a loop and not a long list.
template <class L>
struct KeptSums {
  static constexpr int COLUMNS = kSumFrames, ROWS = COLUMNS + kSumColumns, COUNT = ROWS + kSliceRows;
  static constexpr int FLOATS = COUNT * L::ELEMENTS * kSliceThreads;
  float* floats;

  LLAVA_ST_DEVICE void keep(int which, const Channels<L>& sum) const {
    LLAVA_ST_UNROLL
    for (int e = 0; e < L::ELEMENTS; ++e) floats[at(which, e)] = sum.of[e];
  }

  LLAVA_ST_DEVICE Channels<L> sum(int which) const {
    Channels<L> sum;
    LLAVA_ST_UNROLL
    for (int e = 0; e < L::ELEMENTS; ++e) sum.of[e] = floats[at(which, e)];
    return sum;
  }

 private:
  static LLAVA_ST_DEVICE int at(int which, int element) {
    return (which * L::ELEMENTS + element) * kSliceThreads + thread_index();
  }
};

/// Hands the sums of a tile's patches on to the anchors around them.
template <class L>
LLAVA_ST_DEVICE void add_to_anchors(const SumArguments<typename L::Element>& arguments, const Tile& tile,
                                    const KeptSums<L>& sums, float* anchors) {
  for (int which = 0; which < KeptSums<L>::COUNT; ++which) {
    const bool is_frame = which < KeptSums<L>::COLUMNS, is_row = which >= KeptSums<L>::ROWS;
    const int place = which - (is_frame ? 0 : is_row ? KeptSums<L>::ROWS : KeptSums<L>::COLUMNS);
    if (place >= (is_frame ? tile.frames : is_row ? tile.rows : tile.columns)) continue;
    const int64_t patch = (is_frame ? tile.first.t : is_row ? tile.first.h : tile.first.w) + place;
    const int64_t patches = is_frame ? tile.grid.t : is_row ? tile.grid.h : tile.grid.w;
    const int64_t first = is_frame ? 0 : arguments.temporal + (is_row ? 0 : arguments.height);
    const int64_t count = is_frame ? arguments.temporal : is_row ? arguments.height : arguments.width;
    const Between<float> between =
        patch_between<float>(patch, patches, count, is_frame ? Alignment::kEnds : arguments.spatial);
    const Channels<L> sum = sums.sum(which);
    const int64_t stride = arguments.tiling.channels;
    add_to_anchor<L>(anchors + (first + between.low) * stride, 1.0f - between.ratio, sum);
    if (between.ratio != 0.0f) add_to_anchor<L>(anchors + (first + between.high) * stride, between.ratio, sum);
  }
}

/// Sums up a tile of a packed batch.
template <class L>
LLAVA_ST_DEVICE void keep_sums(const SumArguments<typename L::Element>& arguments, const Tile& tile,
                               const KeptSums<L>& kept, int64_t channel) {
  const Tiling& tiling = arguments.tiling;
  const bool cut = cut_short(tiling, tile);
  TileSums<L> sums;
  const TileRows<const typename L::Element> gradient = packed_rows(tile, arguments.gradient, channel);
  for (int row = 0; row < tile.rows; ++row) {
    const auto columns = [&](int f) {
      if (f >= tile.frames) return 0;
      return cut ? columns_that_exist(tiling, tile, f, row) : tile.columns;
    };
    kept.keep(KeptSums<L>::ROWS + row, sums.add_row(gradient, row, columns));
  }
  LLAVA_ST_UNROLL
  for (int f = 0; f < kSumFrames; ++f) kept.keep(f, sums.frame[f]);
  LLAVA_ST_UNROLL
  for (int c = 0; c < kSumColumns; ++c) kept.keep(KeptSums<L>::COLUMNS + c, sums.column[c]);
}

template <class L>
LLAVA_ST_DEVICE void sum_slice(const SumArguments<typename L::Element>& arguments, const KeptSums<L>& kept,
                               int64_t slice, int64_t channel) {
  const Tiling& tiling = arguments.tiling;
  const int64_t count = arguments.temporal + arguments.height + arguments.width;
  float* const anchors = arguments.anchors + slice * count * tiling.channels + channel;
  for (int64_t anchor = 0; anchor < count; ++anchor) store_floats<L>(anchors + anchor * tiling.channels, Channels<L>());

  const int64_t tiles = tile_count(tiling);
  for (int64_t number = slice; number < tiles; number += arguments.slices) {
    const Tile tile = packed_tile(tiling, number);
    keep_sums(arguments, tile, kept, channel);
    add_to_anchors(arguments, tile, kept, anchors);
  }
}

/// There are few threads, as the slices cost memory, so that each may have many registers.
template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kSliceThreads, 4)
    lape_add_sum_slices(const SumArguments<typename L::Element> arguments) {
  LLAVA_ST_SHARED(float, kept, KeptSums<L>::FLOATS);
  const Tiling& tiling = arguments.tiling;
  const int64_t packets = tiling.by_packets.divisor;
  const int64_t count = arguments.slices * packets;
  for (int64_t i = block_index() * kSliceThreads + thread_index(); i < count; i += block_count() * kSliceThreads) {
    const int64_t slice = tiling.by_packets.quotient(i);
    sum_slice<L>(arguments, {kept}, slice, (i - slice * packets) * L::ELEMENTS);
  }
}

}  // namespace llava_st::cuda
