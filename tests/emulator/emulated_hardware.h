// What csrc/cuda/hardware.cuh offers device code, done by the emulator. Included by it, not by itself.
#pragma once

#include <cmath>
#include <cstring>

#include "emulator.h"

#define LLAVA_ST_DEVICE inline
#define LLAVA_ST_GLOBAL inline
#define LLAVA_ST_LAUNCH_BOUNDS(threads, blocks)
#define LLAVA_ST_UNROLL
#define LLAVA_ST_SHARED(type, name, count) \
  type* const name = static_cast<type*>(emulator::shared_memory(sizeof(type) * (count), emulator::CallSite::here()))

namespace llava_st::cuda {

using emulator::block_count;
using emulator::block_index;
using emulator::block_threads;
using emulator::CallSite;
using emulator::thread_index;

inline void block_barrier(CallSite site = CallSite::here()) { emulator::block_barrier(site); }
inline void warp_barrier(CallSite site = CallSite::here()) { emulator::exchange(0, 0, "a warp barrier", site); }

template <class T>
T shuffle_xor(T value, int mask, CallSite site = CallSite::here()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t sent = 0;
  std::memcpy(&sent, &value, sizeof(T));
  const uint64_t received = emulator::exchange(sent, thread_index() % kWarpSize ^ mask, "shuffle_xor", site);
  std::memcpy(&value, &received, sizeof(T));
  return value;
}

inline float exp2(float x) { return std::exp2f(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float maximum(float a, float b) { return std::fmaxf(a, b); }

inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(float x) { return x; }
inline float float_of(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float float_of(Float16 x) {
  _Float16 half;
  std::memcpy(&half, &x, sizeof(half));
  return static_cast<float>(half);
}

inline void round_to(float& result, float x) { result = x; }
inline void round_to(BFloat16& result, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t half_up = 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  result.bits = std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + half_up) >> 16);
}
inline void round_to(Float16& result, float x) {
  const _Float16 half = static_cast<_Float16>(x);
  std::memcpy(&result, &half, sizeof(half));
}

inline FloatPair bfloat16_pair(uint32_t word) {
  return {float_of(BFloat16{static_cast<uint16_t>(word)}), float_of(BFloat16{static_cast<uint16_t>(word >> 16)})};
}
inline FloatPair float16_pair(uint32_t word) {
  return {float_of(Float16{static_cast<uint16_t>(word)}), float_of(Float16{static_cast<uint16_t>(word >> 16)})};
}

template <class T>
uint32_t word_of(FloatPair pair) {
  T low, high;
  round_to(low, pair.low);
  round_to(high, pair.high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}
inline uint32_t bfloat16_word(FloatPair pair) { return word_of<BFloat16>(pair); }
inline uint32_t float16_word(FloatPair pair) { return word_of<Float16>(pair); }

template <class T>
T* settled(T* pointer) {
  return pointer;
}

template <class T>
T load_once(const T* from, bool wanted) {
  T to = {};
  if (!wanted) return to;
  emulator::check_alignment(from, sizeof(T), "a load");
  std::memcpy(&to, from, sizeof(T));
  return to;
}

template <class T>
void store(T* to, T value) {
  emulator::check_alignment(to, sizeof(T), "a store");
  std::memcpy(to, &value, sizeof(T));
}

template <class T>
void store_streaming(T* to, T value) {
  store(to, value);
}

template <auto kernel, class... Arguments>
void launch(LaunchShape shape, const Arguments&... arguments) {
  emulator::run(__PRETTY_FUNCTION__, shape.blocks, shape.threads, [&] { kernel(arguments...); });
}

}  // namespace llava_st::cuda
