// lape_scatter, backward: the gradient of each row is the sum over the tokens that took it, times their shares. Entries
// say which token and which share, in the order of the rows that they go to.
//
// A block looks up the entries of a few rows and adds them up in order. A row that very many tokens took, such as that
// of padding, would keep its threads for long: runs of entries with one destination are first summed in segments.
#pragma once

#include "tables.cuh"

namespace llava_st::cuda {

constexpr int kGatherThreads = 128;
constexpr int kGatherInFlight = 4;    // rows of the gradient
constexpr int64_t kRowsPerBlock = 8;  // that follow each other: the entries of one begin where those of the last end
constexpr int64_t kSegment = 64;      // entries

template <class T>
struct GatherArguments {
  Rows<const T> gradient;
  const int64_t* destination;  // ascending
  const int64_t* token;
  const double* share;
  int64_t entries;
  float* segments;  // [entries / kSegment, C]: the sums of segments that have one destination

  Rows<T> embed, visual;
  RowsOfKind<void> temporal, height, width;
  int64_t channels;

  LLAVA_ST_HOST_DEVICE int64_t rows() const {
    return embed.count + temporal.count + height.count + width.count + visual.count;
  }
};

/// The first entry, from `begin` on, of row number `row` or a later one.
LLAVA_ST_DEVICE int64_t first_entry_of(const int64_t* destination, int64_t begin, int64_t end, int64_t row) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (destination[middle] < row) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

/// Adds some entries in order. One whose token does not exist makes the sum NaN.
template <class L>
LLAVA_ST_DEVICE void add_entries(const GatherArguments<typename L::Element>& arguments, int64_t begin, int64_t end,
                                 int64_t channel, Channels<L>& sum) {
  using Packet = typename L::Packet;
  for (int64_t first = begin; first < end; first += kGatherInFlight) {
    Packet row[kGatherInFlight];
    float share[kGatherInFlight];
    LLAVA_ST_UNROLL
    for (int i = 0; i < kGatherInFlight; ++i) {
      const int64_t entry = first + i;
      const int64_t token = entry < end ? arguments.token[entry] : 0;
      const bool exists = entry < end && token >= 0 && token < arguments.gradient.count;
      share[i] = exists ? static_cast<float>(arguments.share[entry]) : float_from_bits(0x7fc00000);
      row[i] = load_once(reinterpret_cast<const Packet*>(arguments.gradient.at(token) + channel), exists);
    }
    LLAVA_ST_UNROLL
    for (int i = 0; i < kGatherInFlight; ++i) {
      if (first + i < end) sum.add(share[i], Channels<L>(row[i]));
    }
  }
}

/// Sums up the segments that have one destination; usually there are none.
template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kGatherThreads, 1)
    lape_scatter_sum_segments(const GatherArguments<typename L::Element> arguments) {
  const int64_t segments = arguments.entries / kSegment;
  for (int64_t segment = block_index(); segment < segments; segment += block_count()) {
    const int64_t begin = segment * kSegment, end = begin + kSegment;
    if (arguments.destination[begin] != arguments.destination[end - 1]) continue;
    for (int64_t channel = thread_index() * L::ELEMENTS; channel < arguments.channels;
         channel += kGatherThreads * L::ELEMENTS) {
      Channels<L> sum;
      add_entries(arguments, begin, end, channel, sum);
      store_floats<L>(arguments.segments + segment * arguments.channels + channel, sum);
    }
  }
}

/// The sum of all entries of a row, [begin, end).
template <class L>
LLAVA_ST_DEVICE Channels<L> sum_of_entries(const GatherArguments<typename L::Element>& arguments, int64_t begin,
                                           int64_t end, int64_t channel) {
  Channels<L> sum;
  const int64_t first = ceil_div(begin, kSegment), last = end / kSegment;  // segments
  if (first >= last) {
    add_entries(arguments, begin, end, channel, sum);
    return sum;
  }
  add_entries(arguments, begin, first * kSegment, channel, sum);
  for (int64_t segment = first; segment < last; ++segment) {
    sum.add(load_floats<L>(arguments.segments + segment * arguments.channels + channel));
  }
  add_entries(arguments, last * kSegment, end, channel, sum);
  return sum;
}

/// Rounds this thread's packet of a row's gradient to where it belongs.
template <class L>
LLAVA_ST_DEVICE void store_gradient(const GatherArguments<typename L::Element>& arguments, int64_t row, int64_t channel,
                                    const Channels<L>& sum) {
  using Packet = typename L::Packet;
  if (row < arguments.embed.count) {
    return store_streaming(reinterpret_cast<Packet*>(arguments.embed.at(row) + channel), sum.packed());
  }
  row -= arguments.embed.count;
  if (row < arguments.temporal.count) return store_row<L>(arguments.temporal, row, channel, sum);
  row -= arguments.temporal.count;
  if (row < arguments.height.count) return store_row<L>(arguments.height, row, channel, sum);
  row -= arguments.height.count;
  if (row < arguments.width.count) return store_row<L>(arguments.width, row, channel, sum);
  row -= arguments.width.count;
  store_streaming(reinterpret_cast<Packet*>(arguments.visual.at(row) + channel), sum.packed());
}

template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kGatherThreads, 8)
    lape_scatter_gather(const GatherArguments<typename L::Element> arguments) {
  const int64_t rows = arguments.rows();
  for (int64_t first = block_index() * kRowsPerBlock; first < rows; first += block_count() * kRowsPerBlock) {
    int64_t begin = first_entry_of(arguments.destination, 0, arguments.entries, first);
    for (int64_t row = first; row < smaller(first + kRowsPerBlock, rows); ++row) {
      int64_t end = begin;
      if (begin < arguments.entries && arguments.destination[begin] == row) {
        end = first_entry_of(arguments.destination, begin, arguments.entries, row + 1);
      }
      for (int64_t channel = thread_index() * L::ELEMENTS; channel < arguments.channels;
           channel += kGatherThreads * L::ELEMENTS) {
        store_gradient(arguments, row, channel, sum_of_entries<L>(arguments, begin, end, channel));
      }
      begin = end;
    }
  }
}

}  // namespace llava_st::cuda
