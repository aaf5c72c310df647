// Rows of any float dtype. The tables of anchors need not have the dtype of the embeddings, and few rows come from them
// or go there: which dtype it is, is asked for every packet.
#pragma once

#include "../row_packets.cuh"

namespace llava_st::cuda {

enum class Kind { kFloat, kBFloat16, kFloat16 };

/// A matrix of `count` contiguous rows.
template <class T>
struct Rows {
  T* data;
  int64_t count, stride;

  LLAVA_ST_DEVICE T* at(int64_t row) const { return data + row * stride; }
};

/// The same of a dtype that the host knows. `aligned`: to sixteen bytes, like all that these rows are parts of.
template <class Void>
struct RowsOfKind {
  Void* data;
  int64_t count, stride;
  Kind kind;
  bool aligned;
};

/// Elements that one access moves where COUNT of T lie together.
template <class T, int COUNT>
struct Piece {
  static constexpr int MOST = static_cast<int>(sizeof(Words) / sizeof(T));
  static constexpr int ELEMENTS = COUNT < MOST ? COUNT : MOST;
  using Packet = cuda::Packet<T, ELEMENTS>;
};

template <class L, class T>
LLAVA_ST_DEVICE Channels<L> load_elements(const T* from, bool aligned) {
  using Piece = cuda::Piece<T, L::ELEMENTS>;
  Channels<L> channels;
  if (aligned) {
    LLAVA_ST_UNROLL
    for (int i = 0; i < L::ELEMENTS; i += Piece::ELEMENTS) {
      const auto* const at = reinterpret_cast<const typename Piece::Packet*>(from + i);
      unpack<T>(load_once(at, true), channels.of + i);
    }
  } else {
    LLAVA_ST_UNROLL
    for (int i = 0; i < L::ELEMENTS; ++i) channels.of[i] = float_of(load_once(from + i, true));
  }
  return channels;
}

template <class L, class T>
LLAVA_ST_DEVICE void store_elements(T* to, const Channels<L>& channels, bool aligned) {
  using Piece = cuda::Piece<T, L::ELEMENTS>;
  if (aligned) {
    LLAVA_ST_UNROLL
    for (int i = 0; i < L::ELEMENTS; i += Piece::ELEMENTS) {
      typename Piece::Packet packet;
      pack<T>(channels.of + i, packet);
      store_streaming(reinterpret_cast<typename Piece::Packet*>(to + i), packet);
    }
  } else {
    LLAVA_ST_UNROLL
    for (int i = 0; i < L::ELEMENTS; ++i) {
      T rounded;
      round_to(rounded, channels.of[i]);
      store_streaming(to + i, rounded);
    }
  }
}

/// This thread's channels of a row, in float.
template <class L>
LLAVA_ST_DEVICE Channels<L> load_row(const RowsOfKind<const void>& rows, int64_t row, int64_t channel) {
  const int64_t at = row * rows.stride + channel;
  switch (rows.kind) {
    case Kind::kFloat:
      return load_elements<L>(static_cast<const float*>(rows.data) + at, rows.aligned);
    case Kind::kBFloat16:
      return load_elements<L>(static_cast<const BFloat16*>(rows.data) + at, rows.aligned);
    default:
      return load_elements<L>(static_cast<const Float16*>(rows.data) + at, rows.aligned);
  }
}

/// Rounds them to the dtype of the rows.
template <class L>
LLAVA_ST_DEVICE void store_row(const RowsOfKind<void>& rows, int64_t row, int64_t channel,
                               const Channels<L>& channels) {
  const int64_t at = row * rows.stride + channel;
  switch (rows.kind) {
    case Kind::kFloat:
      return store_elements<L>(static_cast<float*>(rows.data) + at, channels, rows.aligned);
    case Kind::kBFloat16:
      return store_elements<L>(static_cast<BFloat16*>(rows.data) + at, channels, rows.aligned);
    default:
      return store_elements<L>(static_cast<Float16*>(rows.data) + at, channels, rows.aligned);
  }
}

}  // namespace llava_st::cuda
