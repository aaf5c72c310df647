// Included ahead of attention_avx2.cpp. To GCC's sanitizers a streaming store is an opaque builtin: they neither see
// nor check what it writes. Here an ordinary store of the same bytes, which they do see, goes before each.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>

namespace llava_st::tests {

inline __attribute__((always_inline)) void seen_stream(__m128i* to, __m128i bits) {
  *to = bits;
  _mm_stream_si128(to, bits);
}

inline __attribute__((always_inline)) void seen_stream(__m256i* to, __m256i bits) {
  *to = bits;
  _mm256_stream_si256(to, bits);
}

}  // namespace llava_st::tests

#define _mm_stream_si128 ::llava_st::tests::seen_stream
#define _mm256_stream_si256 ::llava_st::tests::seen_stream
#endif
