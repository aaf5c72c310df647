// How a warp lies over the keys of one region and head.
#pragma once

#include "../elements.cuh"

namespace llava_st::cuda {

constexpr int kBlockWarps = 4;
constexpr int kBlockThreads = kBlockWarps * kWarpSize;

/// A row of D elements is read by LANES lanes, each taking VECTORS packets of ELEMENTS; the warp's groups of LANES
/// lanes take different keys. STEPS keys per group form a chunk, which is held in registers whole. MANY: regions may
/// have more keys than one chunk.
template <class T, int ELEMENTS_, int LANES_, int VECTORS_, int STEPS_, bool MANY_>
struct Layout {
  using Element = T;
  using Packet = cuda::Packet<T, ELEMENTS_>;
  static constexpr int ELEMENTS = ELEMENTS_;
  static constexpr int LANES = LANES_;
  static constexpr int VECTORS = VECTORS_;
  static constexpr int STEPS = STEPS_;
  static constexpr bool MANY = MANY_;
  static constexpr bool EXTENDED = false;
  static constexpr int GROUPS = kWarpSize / LANES;
  static constexpr int CHUNK = STEPS * GROUPS;
  static constexpr int ROW = ELEMENTS * VECTORS;  // elements of a row in one lane
};

/// The same for kernels that also know of biases, and of values that have another width than keys.
template <class L>
struct Extended : L {
  static constexpr bool EXTENDED = true;
};

/// The place of this thread's lane in its warp's layout.
template <class L>
struct Lane {
  int group;
  int element;  // of the row, where the lane's first packet begins
  int head_dim;

  LLAVA_ST_DEVICE explicit Lane(int head_dim)
      : group(thread_index() % kWarpSize / L::LANES),
        element(thread_index() % L::LANES * L::ELEMENTS),
        head_dim(head_dim) {}

  /// Where in the row packet number `vector` begins, and whether the row is that long.
  LLAVA_ST_DEVICE int at(int vector) const { return element + vector * L::LANES * L::ELEMENTS; }
  LLAVA_ST_DEVICE bool holds(int vector) const { return at(vector) < head_dim; }
};

/// The sum over the lanes of each group, in all of them.
template <class L>
LLAVA_ST_DEVICE float sum_over_lanes(float x) {
  LLAVA_ST_UNROLL
  for (int mask = L::LANES / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

/// The sum over the groups of the warp, lane by lane.
template <class L>
LLAVA_ST_DEVICE float sum_over_groups(float x) {
  LLAVA_ST_UNROLL
  for (int mask = kWarpSize / 2; mask >= L::LANES; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

template <class L>
LLAVA_ST_DEVICE float maximum_over_groups(float x) {
  LLAVA_ST_UNROLL
  for (int mask = kWarpSize / 2; mask >= L::LANES; mask /= 2) x = maximum(x, shuffle_xor(x, mask));
  return x;
}

/// One lane's share of a row, as it lies in memory.
template <class L>
struct RowPackets {
  typename L::Packet packet[L::VECTORS];
};

/// Reads a row; what the row does not have, or all of it where it is not `wanted`, becomes zero.
template <class L>
LLAVA_ST_DEVICE RowPackets<L> load_row(const typename L::Element* row, const Lane<L>& lane, bool wanted) {
  RowPackets<L> packets;
  LLAVA_ST_UNROLL
  for (int v = 0; v < L::VECTORS; ++v) {
    const auto* from = reinterpret_cast<const typename L::Packet*>(row + lane.at(v));
    packets.packet[v] = load_once(from, wanted && lane.holds(v));
  }
  return packets;
}

/// One lane's share of a row, to calculate with.
template <class L>
struct RowFloats {
  float of[L::ROW];

  LLAVA_ST_DEVICE RowFloats() {
    LLAVA_ST_UNROLL
    for (int i = 0; i < L::ROW; ++i) of[i] = 0.0f;
  }

  LLAVA_ST_DEVICE explicit RowFloats(const RowPackets<L>& packets) {
    LLAVA_ST_UNROLL
    for (int v = 0; v < L::VECTORS; ++v) unpack<typename L::Element>(packets.packet[v], of + v * L::ELEMENTS);
  }

  LLAVA_ST_DEVICE void multiply(float factor) {
    LLAVA_ST_UNROLL
    for (int i = 0; i < L::ROW; ++i) of[i] *= factor;
  }

  LLAVA_ST_DEVICE void add(float factor, const RowPackets<L>& packets) {
    const RowFloats row(packets);
    LLAVA_ST_UNROLL
    for (int i = 0; i < L::ROW; ++i) of[i] += factor * row.of[i];
  }

  /// The inner product with a row, over all lanes of the group.
  LLAVA_ST_DEVICE float dot(const RowPackets<L>& packets) const {
    const RowFloats row(packets);
    float sum = 0.0f;
    LLAVA_ST_UNROLL
    for (int i = 0; i < L::ROW; ++i) sum += of[i] * row.of[i];
    return sum_over_lanes<L>(sum);
  }

  /// This row times a factor, rounded to packets.
  LLAVA_ST_DEVICE RowPackets<L> times(float factor) const {
    RowPackets<L> packets;
    LLAVA_ST_UNROLL
    for (int v = 0; v < L::VECTORS; ++v) {
      float products[L::ELEMENTS];
      LLAVA_ST_UNROLL
      for (int i = 0; i < L::ELEMENTS; ++i) products[i] = of[v * L::ELEMENTS + i] * factor;
      pack<typename L::Element>(products, packets.packet[v]);
    }
    return packets;
  }

  /// The sum of the groups' rows, times a factor, written by the first group.
  LLAVA_ST_DEVICE void store_sum_of_groups(typename L::Element* row, float factor, const Lane<L>& lane) {
    LLAVA_ST_UNROLL
    for (int i = 0; i < L::ROW; ++i) of[i] = sum_over_groups<L>(of[i]);
    const RowPackets<L> packets = times(factor);
    if (lane.group != 0) return;
    LLAVA_ST_UNROLL
    for (int v = 0; v < L::VECTORS; ++v) {
      if (lane.holds(v)) store(reinterpret_cast<typename L::Packet*>(row + lane.at(v)), packets.packet[v]);
    }
  }
};

/// Writes a row that nothing reads again soon.
template <class L>
LLAVA_ST_DEVICE void store_row(typename L::Element* row, const RowPackets<L>& packets, const Lane<L>& lane) {
  LLAVA_ST_UNROLL
  for (int v = 0; v < L::VECTORS; ++v) {
    if (lane.holds(v)) store_streaming(reinterpret_cast<typename L::Packet*>(row + lane.at(v)), packets.packet[v]);
  }
}

}  // namespace llava_st::cuda
