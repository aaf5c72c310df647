// What csrc/cuda/hardware.cuh offers device code, done by the emulator. Included by it, not by itself.
#pragma once

#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "emulator.h"

#define LLAVA_ST_DEVICE inline
#define LLAVA_ST_GLOBAL inline
#define LLAVA_ST_LAUNCH_BOUNDS(threads, blocks)
#define LLAVA_ST_UNROLL
#define LLAVA_ST_SHARED(type, name, count) \
  type* const name = static_cast<type*>(   \
      emulator::shared_memory(sizeof(type) * (count), alignof(type), #name, emulator::CallSite::current()))

/// Functions of this layer are always inlined, so that errors name the line of the kernel that calls them.
#define LLAVA_ST_LAYER inline __attribute__((always_inline))

namespace llava_st::cuda {

using emulator::block_count;
using emulator::block_index;
using emulator::block_threads;
using emulator::CallSite;
using emulator::thread_index;

LLAVA_ST_LAYER void block_barrier(CallSite site = CallSite::current()) { emulator::block_barrier(site); }
LLAVA_ST_LAYER void warp_barrier(uint32_t lanes = kFullWarp, CallSite site = CallSite::current()) {
  emulator::meet_in_warp(lanes, "a warp barrier", site, nullptr, nullptr, true);
}

template <class T>
struct Shuffled {
  T sent;
  int from;  // which lane
  T received;
};

template <class T>
void complete_shuffle(void* const (&lanes)[kWarpSize]) {
  for (void* const lane : lanes) {
    if (lane == nullptr) continue;
    auto* const mine = static_cast<Shuffled<T>*>(lane);
    const auto* const other = static_cast<const Shuffled<T>*>(lanes[static_cast<uint32_t>(mine->from) % kWarpSize]);
    if (other == nullptr) return emulator::note_error("shuffles from a lane that takes no part");
    mine->received = other->sent;
  }
}

template <class T>
LLAVA_ST_LAYER T shuffle(T value, int lane, uint32_t lanes = kFullWarp, CallSite site = CallSite::current()) {
  Shuffled<T> mine = {value, lane, {}};
  emulator::meet_in_warp(lanes, "a shuffle", site, &mine, &complete_shuffle<T>);
  return mine.received;
}

template <class T>
LLAVA_ST_LAYER T shuffle_xor(T value, int mask, uint32_t lanes = kFullWarp, CallSite site = CallSite::current()) {
  return shuffle(value, thread_index() % kWarpSize ^ mask, lanes, site);
}

inline void complete_ballot(void* const (&lanes)[kWarpSize]) {
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes[lane] != nullptr && *static_cast<const uint32_t*>(lanes[lane]) != 0) votes |= 1u << lane;
  }
  for (void* const lane : lanes) {
    if (lane != nullptr) *static_cast<uint32_t*>(lane) = votes;
  }
}

LLAVA_ST_LAYER uint32_t ballot(bool condition, uint32_t lanes = kFullWarp, CallSite site = CallSite::current()) {
  uint32_t votes = condition;
  emulator::meet_in_warp(lanes, "a vote", site, &votes, &complete_ballot);
  return votes;
}
LLAVA_ST_LAYER bool any(bool condition, uint32_t lanes = kFullWarp, CallSite site = CallSite::current()) {
  return ballot(condition, lanes, site) != 0;
}
LLAVA_ST_LAYER bool all(bool condition, uint32_t lanes = kFullWarp, CallSite site = CallSite::current()) {
  return ballot(condition, lanes, site) == lanes;
}

/// Threads run one at a time, so that nothing comes between the two halves.
template <class T>
LLAVA_ST_LAYER T atomic_add(T* to, T value) {
  using std::is_same_v;
  static_assert(is_same_v<T, float> || is_same_v<T, double> || is_same_v<T, int> || is_same_v<T, unsigned> ||
                    is_same_v<T, unsigned long long>,
                "what CUDA adds atomically");
  emulator::check_alignment(to, sizeof(T), "an atomic access");
  emulator::announce_atomic(to, sizeof(T));
  return emulator::add(to, value);
}

inline float exp2(float x) { return std::exp2f(x); }
inline float log2(float x) { return std::log2f(x); }
inline float erf(float x) { return std::erf(x); }
inline float square_root(float x) { return std::sqrt(x); }
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

inline uint32_t low_halves(uint32_t x, uint32_t y) { return (x & 0xffff) | y << 16; }
inline uint32_t high_halves(uint32_t x, uint32_t y) { return x >> 16 | (y & 0xffff0000u); }

template <class T>
T* settled(T* pointer) {
  return pointer;
}

inline int afresh(int number) { return number; }
inline int64_t afresh(int64_t number) { return number; }

template <class T>
LLAVA_ST_LAYER T load_once(const T* from, bool wanted) {
  if (!wanted) return {};
  emulator::check_alignment(from, alignof(T), "a load");
  emulator::announce_load(from, sizeof(T));
  return emulator::load(from);
}

template <class T>
LLAVA_ST_LAYER T load_for_update(const T* from, bool wanted) {
  if (!wanted) return {};
  emulator::check_alignment(from, alignof(T), "a load");
  emulator::announce_read(from, sizeof(T));
  return emulator::load(from);
}

template <class T>
LLAVA_ST_LAYER T load_often(const T* from) {
  return load_once(from, true);
}

template <class T>
LLAVA_ST_LAYER void store(T* to, T value) {
  emulator::check_alignment(to, alignof(T), "a store");
  emulator::announce_store(to, sizeof(T));
  emulator::store(to, value);
}

template <class T>
LLAVA_ST_LAYER void store_streaming(T* to, T value) {
  store(to, value);
}

inline int64_t max_blocks() { return emulator::settings().max_blocks; }

/// Calls a kernel as one of its threads. Not instrumented: the arguments lie in the host's memory.
template <auto kernel, class... Arguments>
__attribute__((no_sanitize("thread"))) void call(const void* arguments) {
  std::apply([](const Arguments&... each) __attribute__((no_sanitize("thread"))) { kernel(each...); },
             *static_cast<const std::tuple<Arguments...>*>(arguments));
}

template <auto kernel, class... Arguments>
void launch(LaunchShape shape, const Arguments&... arguments) {
  const std::tuple<Arguments...> copies(arguments...);
  emulator::run(__PRETTY_FUNCTION__, shape.blocks, shape.threads, &call<kernel, Arguments...>, &copies);
}

}  // namespace llava_st::cuda
