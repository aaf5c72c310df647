// Eight-lane vectors over memory of any element type, in terms of GCC's and Clang's vector extensions.
//
// This file is compiled once per instruction set, each time inside a namespace of its own (LLAVA_ST_ISA), so that the
// linker can never pick an AVX2 copy of an inline function for a processor without AVX2. For the same reason it uses
// nothing inline of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LLAVA_ST_INLINE inline __attribute__((always_inline))

namespace llava_st::LLAVA_ST_ISA {

constexpr int kLanes = 8;

using Float8 = float __attribute__((vector_size(32)));
using Double8 = double __attribute__((vector_size(64)));
using Bits8 = uint32_t __attribute__((vector_size(32)));
using Half8 = uint16_t __attribute__((vector_size(16)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
LLAVA_ST_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

LLAVA_ST_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // Inf and NaN
  // Scaling by 2^112 moves the exponent's bias from 15 to 127 and normalises subnormals on the way.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
}

LLAVA_ST_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (magnitude < 0x38800000) {                       // subnormal: let an addition do the rounding
    return sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000);
  }
  return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
}

/// The type that elements of type T are computed in, and eight of them.
template <class T>
struct Compute {
  using Scalar = float;
  using Vector = Float8;
};
template <>
struct Compute<double> {
  using Scalar = double;
  using Vector = Double8;
};
template <class T>
using Scalar = typename Compute<T>::Scalar;
template <class T>
using Vector = typename Compute<T>::Vector;

LLAVA_ST_INLINE Float8 load(const float* from) {
  Float8 vector;
  memcpy(&vector, from, sizeof(vector));
  return vector;
}

LLAVA_ST_INLINE Double8 load(const double* from) {
  Double8 vector;
  memcpy(&vector, from, sizeof(vector));
  return vector;
}

LLAVA_ST_INLINE Float8 load(const BFloat16* from) {
  Half8 bits;
  memcpy(&bits, from, sizeof(bits));
  return (Float8)(__builtin_convertvector(bits, Bits8) << 16);
}

LLAVA_ST_INLINE Float8 load(const Float16* from) {
#if defined(__F16C__)
  return (Float8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Float8 vector;
  for (int lane = 0; lane < kLanes; ++lane) vector[lane] = half_to_float(from[lane].bits);
  return vector;
#endif
}

LLAVA_ST_INLINE Half8 round_to(const BFloat16*, Float8 vector) {
  const Bits8 bits = (Bits8)vector;
  const Bits8 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Bits8 quiet_nan = bits >> 16 | 0x40;
  const Bits8 is_nan = (Bits8)((bits & 0x7fffffff) > 0x7f800000);
  return __builtin_convertvector((is_nan & quiet_nan) | (~is_nan & rounded), Half8);
}

LLAVA_ST_INLINE Half8 round_to(const Float16*, Float8 vector) {
#if defined(__F16C__)
  return (Half8)_mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT);
#else
  Half8 half;
  for (int lane = 0; lane < kLanes; ++lane) half[lane] = float_to_half(vector[lane]);
  return half;
#endif
}

LLAVA_ST_INLINE Float8 round_to(const float*, Float8 vector) { return vector; }
LLAVA_ST_INLINE Double8 round_to(const double*, Double8 vector) { return vector; }

template <class T>
LLAVA_ST_INLINE void store(T* to, Vector<T> vector) {
  const auto rounded = round_to(to, vector);
  memcpy(to, &rounded, sizeof(rounded));
}

/// A store that goes around the caches where the machine can (`to` aligned to 32 bytes, or 16 for half types): for
/// results that are written once and not read again soon.
template <class T>
LLAVA_ST_INLINE void stream(T* to, Vector<T> vector) {
  const auto rounded = round_to(to, vector);
#if defined(__AVX2__)
  if constexpr (sizeof(rounded) == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)rounded);
  } else {
    for (unsigned part = 0; part < sizeof(rounded) / 32; ++part) {
      __m256i bits;
      memcpy(&bits, reinterpret_cast<const char*>(&rounded) + 32 * part, 32);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + part, bits);
    }
  }
#else
  memcpy(to, &rounded, sizeof(rounded));
#endif
}

/// Orders streamed stores before everything that follows.
LLAVA_ST_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class T>
LLAVA_ST_INLINE Vector<T> load_first(const T* from, int64_t count) {
  T padded[kLanes] = {};
  memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

template <class T>
LLAVA_ST_INLINE void store_first(T* to, Vector<T> vector, int64_t count) {
  T padded[kLanes];
  store(padded, vector);
  memcpy(to, padded, count * sizeof(T));
}

template <class V>
LLAVA_ST_INLINE auto sum_of_lanes(V vector) {
  return ((vector[0] + vector[4]) + (vector[2] + vector[6])) + ((vector[1] + vector[5]) + (vector[3] + vector[7]));
}

}  // namespace llava_st::LLAVA_ST_ISA
