// How lape_add divides a batch among threads: tiles of a few frames, rows and columns, each of them once for every
// packet of channels.
//
// The position of a token is the sum of three rows, of its frame, its row and its column. A thread that takes a tile of
// F x H x W tokens needs F + H + W of them, and in the backward pass has as many sums, instead of 3 F H W.
#pragma once

#include "../../geometry/regions.h"
#include "../divisor.cuh"
#include "../operand.cuh"
#include "../packed_grids.cuh"

namespace llava_st::cuda {

struct Tiling {
  Extent tile;  // at most so many frames, rows and columns
  int64_t channels;
  Divisor by_packets;  // of a row

  // Where the batch is dense: the frames of all samples lie along one axis, grid.t in number.
  Extent grid;
  Divisor by_frames;  // of one sample
  Divisor by_tiles_h, by_tiles_w;
  int64_t tiles;

  // Where the batch is packed. A tile is a region, and the number of tiles is that of queries.
  PackedVideos videos;

  LLAVA_ST_HOST_DEVICE bool packed() const { return videos.offsets != nullptr; }
};

/// How many tiles have tokens. With grids that promise more than there are, some of them may have none yet.
LLAVA_ST_DEVICE int64_t tile_count(const Tiling& tiling) {
  if (!tiling.packed()) return tiling.tiles;
  const PackedVideos& videos = tiling.videos;
  const PackedOffset total = videos.offsets[videos.videos];
  if (total.key <= videos.tokens) return total.query;
  return videos.offsets[video_of_key(videos.offsets, videos.videos, videos.tokens - 1) + 1].query;
}

struct Tile {
  Extent first;               // in the grid
  int frames, rows, columns;  // at most those of the tiling
  Extent at;                  // among the tiles of the grid
  Extent grid;                // of one sample, or of the video
  int64_t sample, frame;      // of a dense batch: the tile's first frame as one of its sample
  int64_t begin;              // of a packed batch: the video's first token

  LLAVA_ST_DEVICE explicit Tile(const Region& region)
      : first(region.first),
        frames(static_cast<int>(region.size.t)),
        rows(static_cast<int>(region.size.h)),
        columns(static_cast<int>(region.size.w)),
        at(region.at) {}
};

LLAVA_ST_DEVICE Tile dense_tile(const Tiling& tiling, int64_t number) {
  const int64_t line = tiling.by_tiles_w.quotient(number);
  const int64_t t = tiling.by_tiles_h.quotient(line);
  const Extent at = {t, line - t * tiling.by_tiles_h.divisor, number - line * tiling.by_tiles_w.divisor};
  Tile tile(region_at(tiling.grid, tiling.tile, at));
  tile.grid = {tiling.by_frames.divisor, tiling.grid.h, tiling.grid.w};
  tile.sample = tiling.by_frames.quotient(tile.first.t);
  tile.frame = tile.first.t - tile.sample * tile.grid.t;
  tile.begin = 0;
  return tile;
}

LLAVA_ST_DEVICE Tile packed_tile(const Tiling& tiling, int64_t number) {
  const PackedVideos& videos = tiling.videos;
  const int64_t video = video_of_query(videos.offsets, videos.videos, number);
  const PackedOffset begin = videos.offsets[video];
  const Extent grid = videos.grids[video];
  Tile tile(region_at(grid, tiling.tile, number - begin.query));
  tile.grid = grid;
  tile.sample = 0;
  tile.frame = tile.first.t;
  tile.begin = begin.key;
  return tile;
}

LLAVA_ST_DEVICE Tile tile_at(const Tiling& tiling, int64_t number) {
  return tiling.packed() ? packed_tile(tiling, number) : dense_tile(tiling, number);
}

/// The number of a token of a packed batch, given its place in the tile.
LLAVA_ST_DEVICE int64_t token_number(const Tile& tile, int frame, int row, int column) {
  const Extent& first = tile.first;
  return tile.begin + ((first.t + frame) * tile.grid.h + first.h + row) * tile.grid.w + first.w + column;
}

/// Whether some of a tile's tokens do not exist, as only grids can have it that promise more than there are.
LLAVA_ST_DEVICE bool cut_short(const Tiling& tiling, const Tile& tile) {
  return tiling.packed() &&
         token_number(tile, tile.frames - 1, tile.rows - 1, tile.columns - 1) >= tiling.videos.tokens;
}

/// The rows of a tile's tokens in one tensor.
template <class T>
struct TileRows {
  T* first;
  int64_t frame, row, column;  // from one to the next
  int64_t sample;              // and, besides, from the last frame of a sample to the first of the next

  LLAVA_ST_DEVICE T* at(int of_frame, int of_row, int of_column, int64_t samples_later = 0) const {
    return first + of_frame * frame + of_row * row + of_column * column + samples_later * sample;
  }
};

template <class T>
LLAVA_ST_DEVICE TileRows<T> dense_rows(const Tile& tile, const Operand<T>& operand, int64_t channel) {
  const TokenStrides& strides = operand.strides;
  const int64_t origin = tile.sample * strides.sample + strides.offset({tile.frame, tile.first.h, tile.first.w});
  return {operand.data + origin + channel, strides.t, strides.h, strides.w, strides.sample - tile.grid.t * strides.t};
}

template <class T>
LLAVA_ST_DEVICE TileRows<T> packed_rows(const Tile& tile, const Operand<T>& operand, int64_t channel) {
  const TokenStrides strides = packed_strides(tile.grid, operand.strides.w, 0);
  const int64_t origin = tile.begin * operand.strides.w + strides.offset(tile.first);
  return {operand.data + origin + channel, strides.t, strides.h, strides.w, 0};
}

template <class T>
LLAVA_ST_DEVICE TileRows<T> rows_of(const Tiling& tiling, const Tile& tile, const Operand<T>& operand,
                                    int64_t channel) {
  return tiling.packed() ? packed_rows(tile, operand, channel) : dense_rows(tile, operand, channel);
}

}  // namespace llava_st::cuda
