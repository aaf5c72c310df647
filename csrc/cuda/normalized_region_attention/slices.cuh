// What a warp of the tensor-core kernels holds of rows: two steps of 64 channels, in packets of eight.
//
// Lane number 4 g + p of a matrix product holds words of two neighbours along k, which are channels where scores are
// summed, and rows where rows are. So there are two ways to lie over rows, with sixteen bytes in every load:
//   along groups: row g; of the 64 channels of a step the packets at 8p and at 32 + 8p. Their words are fragments as
//     they are: any order of the channels will do, so long as both factors have the same.
//   along pairs: rows 2p, 2p+1 (and 2p+8, 2p+9), the packet at 32 (g % 2) + 8 (g / 2). With the neighbours of a word
//     taken from two rows, product number c is of channels c of all packets, and has its results where a lane that
//     lies along groups has these channels: columns 2p and 2p+1 are the packets at 8p and 32 + 8p.
#pragma once

#include "../matrix_product.cuh"
#include "rows.cuh"

namespace llava_st::cuda {

constexpr int kPacket = 8;  // channels
constexpr int kStepChannels = 64;
constexpr int kSteps = 2;
constexpr int kSliceChannels = kSteps * kStepChannels;
constexpr int kMostWarps = 16;
constexpr int kMostTileThreads = kMostWarps * kWarpSize;
constexpr int kTileRows = 16;  // keys of a region, at most
constexpr int kTileHeads = 8;  // that go through one matrix product

struct TileLane {
  int warp, group, pair;
  int width;

  LLAVA_ST_DEVICE explicit TileLane(int width)
      : warp(thread_index() / kWarpSize),
        group(thread_index() % kWarpSize / 4),
        pair(thread_index() % 4),
        width(width) {}

  LLAVA_ST_DEVICE int begin() const { return warp * kSliceChannels; }

  /// Which of sixteen rows the lane's number `i` of four is, where rows lie along pairs.
  LLAVA_ST_DEVICE int row_of_pair(int i) const { return 2 * pair + i % 2 + i / 2 * 8; }
};

/// How many channels of rows a warp has.
LLAVA_ST_DEVICE int slice_channels(int warp, int width) {
  const int left = width - warp * kSliceChannels;
  return left < kSliceChannels ? left : kSliceChannels;
}

struct AlongGroups {
  static constexpr int PACKETS = 2 * kSteps;
  static LLAVA_ST_DEVICE int channel(const TileLane& lane, int packet) {
    return lane.begin() + packet * (kStepChannels / 2) + lane.pair * kPacket;
  }
  static LLAVA_ST_DEVICE float sum_over_row(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
  }
};

struct AlongPairs {
  static constexpr int PACKETS = kSteps;
  static LLAVA_ST_DEVICE int channel(const TileLane& lane, int packet) {
    return lane.begin() + packet * kStepChannels + lane.group % 2 * (kStepChannels / 2) + lane.group / 2 * kPacket;
  }
  static LLAVA_ST_DEVICE float sum_over_row(float x) {
    x += shuffle_xor(x, 4);
    x += shuffle_xor(x, 8);
    return x + shuffle_xor(x, 16);
  }
};

/// Of a row, in the channels of one warp.
struct Moments {
  float mean;
  float squares;  // the sum of the squared distances from it
};

/// One packet of a row that is read more than once.
template <class T, class Along>
LLAVA_ST_DEVICE Words load_packet(const T* row, const TileLane& lane, int packet, bool wanted) {
  const int channel = Along::channel(lane, packet);
  if (!wanted || channel >= lane.width) return {};
  return load_often(reinterpret_cast<const Words*>(row + channel));
}

/// A lane's share of one row. What the row does not have is zero.
template <class T, class Along>
struct Slice {
  Words packet[Along::PACKETS];

  /// Of a row that no other load of this launch reads.
  LLAVA_ST_DEVICE void load_once(const T* row, const TileLane& lane, bool wanted) {
    LLAVA_ST_UNROLL
    for (int i = 0; i < Along::PACKETS; ++i) {
      const int channel = Along::channel(lane, i);
      packet[i] = cuda::load_once(reinterpret_cast<const Words*>(row + channel), wanted && channel < lane.width);
    }
  }

  LLAVA_ST_DEVICE void load_often(const T* row, const TileLane& lane, bool wanted) {
    LLAVA_ST_UNROLL
    for (int i = 0; i < Along::PACKETS; ++i) packet[i] = load_packet<T, Along>(row, lane, i, wanted);
  }

  /// The sum over the warp's channels, in all lanes that have the row.
  LLAVA_ST_DEVICE float sum() const {
    float sum = 0.0f;
    LLAVA_ST_UNROLL
    for (int i = 0; i < Along::PACKETS; ++i) {
      float x[kPacket];
      unpack<T>(packet[i], x);
      LLAVA_ST_UNROLL
      for (int c = 0; c < kPacket; ++c) sum += x[c];
    }
    return Along::sum_over_row(sum);
  }

  /// Lets go of what has been calculated from the packets: as floats they would take twice the registers.
  LLAVA_ST_DEVICE void keep_packed() {
    LLAVA_ST_UNROLL
    for (int i = 0; i < Along::PACKETS; ++i) {
      LLAVA_ST_UNROLL
      for (int word = 0; word < 4; ++word) {
        packet[i].word[word] = static_cast<uint32_t>(afresh(static_cast<int>(packet[i].word[word])));
      }
    }
  }

  LLAVA_ST_DEVICE Moments moments(const TileLane& lane) {
    const float mean = sum() / static_cast<float>(slice_channels(lane.warp, lane.width));
    keep_packed();
    float squares = 0.0f;
    LLAVA_ST_UNROLL
    for (int i = 0; i < Along::PACKETS; ++i) {
      if (Along::channel(lane, i) >= lane.width) continue;
      float x[kPacket];
      unpack<T>(packet[i], x);
      LLAVA_ST_UNROLL
      for (int c = 0; c < kPacket; ++c) squares += (x[c] - mean) * (x[c] - mean);
    }
    keep_packed();
    return {mean, Along::sum_over_row(squares)};
  }
};

/// d += the inner products, over the warp's channels, of sixteen rows (g and g + 8) with eight others.
template <class T>
LLAVA_ST_DEVICE void multiply_slices(const Slice<T, AlongGroups> (&rows)[2], const Slice<T, AlongGroups>& others,
                                     float (&d)[4]) {
  LLAVA_ST_UNROLL
  for (int i = 0; i < AlongGroups::PACKETS; ++i) {
    LLAVA_ST_UNROLL
    for (int word = 0; word < 4; word += 2) {
      const uint32_t a[4] = {rows[0].packet[i].word[word], rows[1].packet[i].word[word],
                             rows[0].packet[i].word[word + 1], rows[1].packet[i].word[word + 1]};
      const uint32_t b[2] = {others.packet[i].word[word], others.packet[i].word[word + 1]};
      multiply_add_16x8x16<T>(d, a, b);
    }
  }
}

/// Channel `c` of the packets of two rows.
LLAVA_ST_DEVICE uint32_t neighbours(const Words& first, const Words& second, int c) {
  const uint32_t x = first.word[c / 2], y = second.word[c / 2];
  return c % 2 == 0 ? low_halves(x, y) : high_halves(x, y);
}

/// What sums over sixteen rows come to in a step's channels: d[c] of channels c of the packets.
struct StepSums {
  float d[kPacket][4] = {};

  /// Adds the rows 2p, 2p+1, 2p+8, 2p+9, times factors that lie as matrix products have them.
  template <class T>
  LLAVA_ST_DEVICE void add(const uint32_t (&factors)[4], const Words& x0, const Words& x1, const Words& x8,
                           const Words& x9) {
    LLAVA_ST_UNROLL
    for (int c = 0; c < kPacket; ++c) {
      const uint32_t b[2] = {neighbours(x0, x1, c), neighbours(x8, x9, c)};
      multiply_add_16x8x16<T>(d[c], factors, b);
    }
  }
};

}  // namespace llava_st::cuda
