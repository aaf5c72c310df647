// How threads lie over rows of channels: each takes a packet of neighbouring ones, and calculates with them in float.
#pragma once

#include "elements.cuh"

namespace llava_st::cuda {

/// ELEMENTS channels of T per thread: what one load moves.
template <class T, int ELEMENTS_>
struct Packets {
  using Element = T;
  using Packet = cuda::Packet<T, ELEMENTS_>;
  static constexpr int ELEMENTS = ELEMENTS_;
  static constexpr int FLOATS = ELEMENTS < 4 ? ELEMENTS : 4;
  using FloatPacket = cuda::Packet<float, FLOATS>;
};

/// A packet's channels in float.
template <class L>
struct Channels {
  static constexpr int COUNT = L::ELEMENTS;
  float of[COUNT];

  LLAVA_ST_DEVICE Channels() {
    LLAVA_ST_UNROLL
    for (int i = 0; i < COUNT; ++i) of[i] = 0.0f;
  }

  LLAVA_ST_DEVICE explicit Channels(const typename L::Packet& packet) { unpack<typename L::Element>(packet, of); }

  LLAVA_ST_DEVICE typename L::Packet packed() const {
    typename L::Packet packet;
    pack<typename L::Element>(of, packet);
    return packet;
  }

  /// Rounded to the dtype of the elements.
  LLAVA_ST_DEVICE Channels rounded() const { return Channels(packed()); }

  LLAVA_ST_DEVICE void scale(float factor) {
    LLAVA_ST_UNROLL
    for (int i = 0; i < COUNT; ++i) of[i] *= factor;
  }

  LLAVA_ST_DEVICE void add(const Channels& other) {
    LLAVA_ST_UNROLL
    for (int i = 0; i < COUNT; ++i) of[i] += other.of[i];
  }

  LLAVA_ST_DEVICE void add(float factor, const Channels& other) {
    LLAVA_ST_UNROLL
    for (int i = 0; i < COUNT; ++i) of[i] += factor * other.of[i];
  }
};

// The same channels as they lie in a row of floats: one load or store moves four of them at most.

/// What the launch only reads.
template <class L>
LLAVA_ST_DEVICE Channels<L> load_floats(const float* from) {
  Channels<L> channels;
  LLAVA_ST_UNROLL
  for (int i = 0; i < L::ELEMENTS; i += L::FLOATS) {
    unpack<float>(load_often(reinterpret_cast<const typename L::FloatPacket*>(from + i)), channels.of + i);
  }
  return channels;
}

/// What this thread wrote.
template <class L>
LLAVA_ST_DEVICE Channels<L> load_own_floats(const float* from) {
  Channels<L> channels;
  LLAVA_ST_UNROLL
  for (int i = 0; i < L::ELEMENTS; i += L::FLOATS) {
    const auto* const at = reinterpret_cast<const typename L::FloatPacket*>(from + i);
    unpack<float>(load_for_update(at, true), channels.of + i);
  }
  return channels;
}

template <class L>
LLAVA_ST_DEVICE void store_floats(float* to, const Channels<L>& channels) {
  LLAVA_ST_UNROLL
  for (int i = 0; i < L::ELEMENTS; i += L::FLOATS) {
    typename L::FloatPacket packet;
    pack<float>(channels.of + i, packet);
    store(reinterpret_cast<typename L::FloatPacket*>(to + i), packet);
  }
}

}  // namespace llava_st::cuda
