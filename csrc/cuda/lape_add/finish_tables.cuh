// The last step of lape_add's backward pass: from sums over patches, each in several slices, to gradients of anchors,
// rounded once. A warp takes every fourth of the terms of an anchor; the four sums are added in order.
#pragma once

#include "../../geometry/anchors.h"
#include "../divisor.cuh"
#include "../row_packets.cuh"

namespace llava_st::cuda {

constexpr int kFinishWarps = 4;
constexpr int kFinishThreads = kFinishWarps * kWarpSize;

/// The sums over the patches along one axis, and the table whose gradient they become.
template <class T>
struct PatchSums {
  const float* sums;  // patch i of slice s at (s slice + i) C
  int64_t slices, slice;
  int64_t patches;
  int64_t count;  // of anchors
  Alignment alignment;
  T* gradient;  // [count, C]
};

template <class T>
struct FinishArguments {
  PatchSums<T> temporal, height, width;
  int64_t channels;
  Divisor by_chunks;  // of a row: what a warp takes at once
};

/// The first patch, in [0, patches], that lies above anchor number `anchor`; if `or_near`, that it has a part in too,
/// being less than one anchor away.
LLAVA_ST_DEVICE int64_t first_patch_above(int64_t anchor, bool or_near, int64_t patches, int64_t count,
                                          Alignment alignment) {
  int64_t begin = 0, end = patches;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    const Between<float> between = patch_between<float>(middle, patches, count, alignment);
    if (or_near ? between.high >= anchor : between.low > anchor) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

/// This warp's part of an anchor's gradient.
template <class L>
LLAVA_ST_DEVICE Channels<L> gradient_of_anchor(const PatchSums<typename L::Element>& from, int64_t anchor,
                                               int64_t channels, int64_t channel) {
  int64_t patch = first_patch_above(anchor, true, from.patches, from.count, from.alignment);
  const int64_t end = first_patch_above(anchor, false, from.patches, from.count, from.alignment);
  Channels<L> sum;
  int64_t slice = thread_index() / kWarpSize;
  while (true) {
    while (patch < end && slice >= from.slices) {
      slice -= from.slices;
      ++patch;
    }
    if (patch >= end) return sum;
    const Between<float> between = patch_between<float>(patch, from.patches, from.count, from.alignment);
    const float share = between.low == anchor ? 1.0f - between.ratio : between.ratio;
    const auto slice_at = [&](int64_t number) {
      return load_floats<L>(from.sums + (number * from.slice + patch) * channels + channel);
    };
    Channels<L> of_patch;
    // Pairs of pairs: so loads need not wait for each other, and the error of rounding is smaller.
    for (; slice + 3 * kFinishWarps < from.slices; slice += 4 * kFinishWarps) {
      Channels<L> pair = slice_at(slice), other = slice_at(slice + 2 * kFinishWarps);
      pair.add(slice_at(slice + kFinishWarps));
      other.add(slice_at(slice + 3 * kFinishWarps));
      pair.add(other);
      of_patch.add(pair);
    }
    for (; slice < from.slices; slice += kFinishWarps) of_patch.add(slice_at(slice));
    sum.add(share, of_patch);
  }
}

template <class L>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kFinishThreads, 1)
    lape_add_finish(const FinishArguments<typename L::Element> arguments) {
  LLAVA_ST_SHARED(float, parts, kFinishThreads* L::ELEMENTS);
  const int64_t chunks = arguments.by_chunks.divisor;
  const int64_t until_height = arguments.temporal.count, until_width = until_height + arguments.height.count;
  const int64_t work = (until_width + arguments.width.count) * chunks;
  const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  for (int64_t i = block_index(); i < work; i += block_count()) {
    const int64_t row = arguments.by_chunks.quotient(i);
    const int64_t channel = ((i - row * chunks) * kWarpSize + lane) * L::ELEMENTS;
    const PatchSums<typename L::Element>& from = row < until_height  ? arguments.temporal
                                                 : row < until_width ? arguments.height
                                                                     : arguments.width;
    const int64_t anchor = row - (row < until_height ? 0 : row < until_width ? until_height : until_width);
    Channels<L> sum;
    if (channel < arguments.channels) sum = gradient_of_anchor<L>(from, anchor, arguments.channels, channel);
    LLAVA_ST_UNROLL
    for (int e = 0; e < L::ELEMENTS; ++e) parts[e * kFinishThreads + thread_index()] = sum.of[e];
    block_barrier();
    if (warp == 0 && channel < arguments.channels) {
      LLAVA_ST_UNROLL
      for (int other = 1; other < kFinishWarps; ++other) {
        LLAVA_ST_UNROLL
        for (int e = 0; e < L::ELEMENTS; ++e) sum.of[e] += parts[e * kFinishThreads + other * kWarpSize + lane];
      }
      auto* const to = from.gradient + anchor * arguments.channels + channel;
      store(reinterpret_cast<typename L::Packet*>(to), sum.packed());
    }
    block_barrier();
  }
}

}  // namespace llava_st::cuda
