// lape_scatter, forward: every token takes its row from one of three sources. A block per token.
//
// Whether the sources exist is not known on the host, and nothing is read back: where one does not, the row becomes
// NaN.
#pragma once

#include "../../geometry/anchors.h"
#include "tables.cuh"

namespace llava_st::cuda {

constexpr int kScatterThreads = 128;
constexpr int kScatterInFlight = 4;  // packets of a row that a thread copies at once

/// A vector of int32 or int64.
struct Integers {
  const void* data;
  int64_t stride;
  bool wide;

  LLAVA_ST_DEVICE int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * stride] : static_cast<const int32_t*>(data)[i * stride];
  }
};

template <class T>
struct ScatterArguments {
  Rows<const T> embed, visual;
  RowsOfKind<const void> temporal, height, width;
  Integers input_ids, visual_index;
  const int8_t* axis;
  const double* positions;
  int64_t axis_stride, positions_stride;
  T* output;  // contiguous
  int64_t tokens, channels;
};

/// Where the row of a token comes from: it is copied, or interpolated in a table; where there is neither, it is NaN.
template <class T>
struct Source {
  const T* row = nullptr;
  RowsOfKind<const void> table = {};
  int64_t low = 0, high = 0;  // rows of the table
  float ratio = 0.0f, rest = 1.0f;

  LLAVA_ST_DEVICE Source(const ScatterArguments<T>& arguments, int64_t token) {
    const int64_t visual = arguments.visual_index.at(token);
    if (visual != -1) {
      if (visual >= 0 && visual < arguments.visual.count) row = arguments.visual.at(visual);
      return;
    }
    const int axis = arguments.axis[token * arguments.axis_stride];
    if (axis != -1) {
      take_coordinate(arguments, axis, arguments.positions[token * arguments.positions_stride]);
    } else {
      take_id(arguments, arguments.input_ids.at(token));
    }
  }

 private:
  LLAVA_ST_DEVICE void take_coordinate(const ScatterArguments<T>& arguments, int axis, double position) {
    if (axis < 0 || axis > 2 || position != position) return;
    table = axis == 0 ? arguments.temporal : axis == 1 ? arguments.height : arguments.width;
    const Between<double> between = coordinate_between(position, table.count);
    low = between.low;
    high = between.high;
    ratio = static_cast<float>(between.ratio);
    rest = static_cast<float>(1.0 - between.ratio);
  }

  LLAVA_ST_DEVICE void take_id(const ScatterArguments<T>& arguments, int64_t id) {
    if (id < 0) return;
    if (id < arguments.embed.count) {
      row = arguments.embed.at(id);
      return;
    }
    id -= arguments.embed.count;
    const int64_t until_height = arguments.temporal.count, until_width = until_height + arguments.height.count;
    if (id >= until_width + arguments.width.count) return;
    table = id < until_height ? arguments.temporal : id < until_width ? arguments.height : arguments.width;
    low = high = id - (id < until_height ? 0 : id < until_width ? until_height : until_width);
  }
};

/// Copies a row of the same dtype.
template <class L>
LLAVA_ST_DEVICE void copy_row(const typename L::Element* from, typename L::Element* to, int64_t packets) {
  using Packet = typename L::Packet;
  const auto* const source = reinterpret_cast<const Packet*>(from);
  auto* const target = reinterpret_cast<Packet*>(to);
  for (int64_t first = thread_index(); first < packets; first += kScatterInFlight * kScatterThreads) {
    Packet copied[kScatterInFlight];
    LLAVA_ST_UNROLL
    for (int i = 0; i < kScatterInFlight; ++i) {
      const int64_t at = first + i * kScatterThreads;
      copied[i] = load_once(source + at, at < packets);
    }
    LLAVA_ST_UNROLL
    for (int i = 0; i < kScatterInFlight; ++i) {
      const int64_t at = first + i * kScatterThreads;
      if (at < packets) store_streaming(target + at, copied[i]);
    }
  }
}

/// This thread's packet of a row that is interpolated, or NaN.
template <class L>
LLAVA_ST_DEVICE Channels<L> interpolated(const Source<typename L::Element>& source, int64_t channel) {
  if (source.table.data == nullptr) {
    Channels<L> nothing;
    LLAVA_ST_UNROLL
    for (int i = 0; i < L::ELEMENTS; ++i) nothing.of[i] = float_from_bits(0x7fc00000);
    return nothing;
  }
  Channels<L> row = load_row<L>(source.table, source.low, channel);
  if (source.high != source.low) {
    const Channels<L> high = load_row<L>(source.table, source.high, channel);
    row.scale(source.rest);
    row.add(source.ratio, high);
  }
  return row;
}

template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kScatterThreads, 8)
    lape_scatter_forward(const ScatterArguments<typename L::Element> arguments) {
  const int64_t packets = arguments.channels / L::ELEMENTS;
  for (int64_t token = block_index(); token < arguments.tokens; token += block_count()) {
    const Source<typename L::Element> source(arguments, token);
    auto* const to = arguments.output + token * arguments.channels;
    if (source.row != nullptr) {
      copy_row<L>(source.row, to, packets);
      continue;
    }
    for (int64_t packet = thread_index(); packet < packets; packet += kScatterThreads) {
      const Channels<L> row = interpolated<L>(source, packet * L::ELEMENTS);
      store_streaming(reinterpret_cast<typename L::Packet*>(to) + packet, row.packed());
    }
  }
}

}  // namespace llava_st::cuda
