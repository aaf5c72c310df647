// Elements in registers: packed as they lie in memory, or as floats to calculate with.
#pragma once

#include <type_traits>

#include "hardware.cuh"

namespace llava_st::cuda {

template <class T, int COUNT>
constexpr bool kFillsWords = COUNT * sizeof(T) == sizeof(Words);
template <class T, int COUNT>
using WordsFor = std::conditional_t<kFillsWords<T, COUNT>, Words, WordPair>;

/// COUNT elements of T that one load moves: sixteen bytes of them, eight, or a single one.
template <class T, int COUNT>
using Packet = std::conditional_t<COUNT == 1, T, WordsFor<T, COUNT>>;

/// The elements of words, one after the other.
template <class T, class WordsOrPair>
LLAVA_ST_DEVICE void unpack_words(const WordsOrPair& packet, float* to) {
  constexpr int count = sizeof(WordsOrPair) / sizeof(uint32_t);
  LLAVA_ST_UNROLL
  for (int i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      to[i] = float_from_bits(packet.word[i]);
    } else {
      FloatPair pair;
      if constexpr (std::is_same_v<T, BFloat16>) {
        pair = bfloat16_pair(packet.word[i]);
      } else {
        pair = float16_pair(packet.word[i]);
      }
      to[2 * i] = pair.low;
      to[2 * i + 1] = pair.high;
    }
  }
}

template <class T>
LLAVA_ST_DEVICE void unpack(T packet, float* to) {
  to[0] = float_of(packet);
}
template <class T>
LLAVA_ST_DEVICE void unpack(Words packet, float* to) {
  unpack_words<T>(packet, to);
}
template <class T>
LLAVA_ST_DEVICE void unpack(WordPair packet, float* to) {
  unpack_words<T>(packet, to);
}

template <class T, class WordsOrPair>
LLAVA_ST_DEVICE void pack_words(const float* from, WordsOrPair& packet) {
  constexpr int count = sizeof(WordsOrPair) / sizeof(uint32_t);
  LLAVA_ST_UNROLL
  for (int i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      packet.word[i] = bits_of(from[i]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      packet.word[i] = bfloat16_word({from[2 * i], from[2 * i + 1]});
    } else {
      packet.word[i] = float16_word({from[2 * i], from[2 * i + 1]});
    }
  }
}

/// Rounds floats to a packet of T.
template <class T>
LLAVA_ST_DEVICE void pack(const float* from, T& packet) {
  round_to(packet, from[0]);
}
template <class T>
LLAVA_ST_DEVICE void pack(const float* from, Words& packet) {
  pack_words<T>(from, packet);
}
template <class T>
LLAVA_ST_DEVICE void pack(const float* from, WordPair& packet) {
  pack_words<T>(from, packet);
}

}  // namespace llava_st::cuda
