// The tables of anchors as the kernels of lape_add read them: in float, and no longer than the axes that they serve.
#pragma once

#include "../../geometry/anchors.h"
#include "../divisor.cuh"
#include "../row_packets.cuh"

namespace llava_st::cuda {

constexpr int kTableThreads = 128;

struct FloatTable {
  const float* rows;  // contiguous
  int64_t count, channels;
  Alignment alignment;  // of patches
};

/// The row of patch `i`, of `size` along this axis.
template <class L>
LLAVA_ST_DEVICE Channels<L> row_of_patch(const FloatTable& table, int64_t i, int64_t size, int64_t channel) {
  const Between<float> between = patch_between<float>(i, size, table.count, table.alignment);
  Channels<L> row = load_floats<L>(table.rows + between.low * table.channels + channel);
  if (between.ratio != 0.0f) {
    row.scale(1.0f - between.ratio);
    row.add(between.ratio, load_floats<L>(table.rows + between.high * table.channels + channel));
  }
  return row;
}

/// A table that becomes `size` rows in float.
template <class T>
struct TableToResize {
  const T* rows;
  int64_t count, stride, size;
  Alignment alignment;
};

template <class T>
struct ResizeArguments {
  TableToResize<T> temporal, height, width;
  float* rows;  // contiguous: those of temporal, height and width, one after the other
  int64_t channels;
  Divisor by_channels;
};

/// One element per thread: there are few of them, compared to the features.
template <class T>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kTableThreads, 1) resize_tables(const ResizeArguments<T> arguments) {
  const int64_t until_height = arguments.temporal.size, until_width = until_height + arguments.height.size;
  const int64_t elements = (until_width + arguments.width.size) * arguments.channels;
  for (int64_t at = block_index() * kTableThreads + thread_index(); at < elements;
       at += block_count() * kTableThreads) {
    const int64_t row = arguments.by_channels.quotient(at);
    const int64_t channel = at - row * arguments.channels;
    const TableToResize<T>& table = row < until_height  ? arguments.temporal
                                    : row < until_width ? arguments.height
                                                        : arguments.width;
    const int64_t i = row - (row < until_height ? 0 : row < until_width ? until_height : until_width);
    const Between<float> between = patch_between<float>(i, table.size, table.count, table.alignment);
    const float low = float_of(table.rows[between.low * table.stride + channel]);
    const float high = float_of(table.rows[between.high * table.stride + channel]);
    store(arguments.rows + at, between.ratio == 0.0f ? low : (1.0f - between.ratio) * low + between.ratio * high);
  }
}

}  // namespace llava_st::cuda
