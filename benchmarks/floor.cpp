// The least that any kernel must do to memory: read every input byte once, write every output byte once into memory
// that was just allocated. No arithmetic beside a sum, which proves that the bytes were read.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr size_t kLine = 64;
constexpr size_t kPiece = 32 << 10;      // of the largest buffer; the others advance in proportion
constexpr size_t kPrefetchAhead = 1024;  // bytes
constexpr size_t kHugePage = 2 << 20;

typedef uint64_t Line __attribute__((vector_size(kLine)));

struct Span {
  size_t begin, end;  // bytes, multiples of kLine
};

/// Part `index` of `count` of a buffer.
Span part(Span whole, size_t index, size_t count) {
  const size_t lines = (whole.end - whole.begin) / kLine;
  return {whole.begin + lines * index / count * kLine, whole.begin + lines * (index + 1) / count * kLine};
}

Line load(const char* address) {
  Line line;
  std::memcpy(&line, address, kLine);
  return line;
}

template <bool kPrefetch>
void read(const char* buffer, Span span, Line sums[4]) {
  const char* at = buffer + span.begin;
  const char* const end = buffer + span.end;
  for (; at + 4 * kLine <= end; at += 4 * kLine) {
    for (int i = 0; i < 4; ++i) {
      if (kPrefetch) __builtin_prefetch(at + i * kLine + kPrefetchAhead);
      sums[i] += load(at + i * kLine);
    }
  }
  for (; at < end; at += kLine) sums[0] += load(at);
}

template <bool kStreaming>
void write(char* buffer, Span span, uint64_t pattern) {
  for (char* at = buffer + span.begin; at < buffer + span.end; at += kLine) {
#if defined(__AVX512F__)
    if (kStreaming) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(at), _mm512_set1_epi64(pattern));
      continue;
    }
#elif defined(__SSE2__)
    if (kStreaming) {
      for (size_t i = 0; i < kLine; i += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(at + i), _mm_set1_epi64x(pattern));
      }
      continue;
    }
#endif
    const Line line = Line{} + pattern;
    std::memcpy(at, &line, kLine);
  }
}

struct Pass {
  const char* const* inputs;
  const size_t* input_bytes;
  int input_count;
  char* const* outputs;
  const size_t* output_bytes;
  int output_count;
  uint64_t pattern;
};

template <bool kStreaming, bool kPrefetch>
uint64_t run(const Pass& pass, size_t thread, size_t threads) {
  size_t largest = 0;
  for (int i = 0; i < pass.input_count; ++i) largest = pass.input_bytes[i] > largest ? pass.input_bytes[i] : largest;
  for (int i = 0; i < pass.output_count; ++i) largest = pass.output_bytes[i] > largest ? pass.output_bytes[i] : largest;
  const size_t pieces = largest / threads / kPiece + 1;
  Line sums[4] = {};
  for (size_t piece = 0; piece < pieces; ++piece) {
    for (int i = 0; i < pass.input_count; ++i) {
      read<kPrefetch>(pass.inputs[i], part(part({0, pass.input_bytes[i]}, thread, threads), piece, pieces), sums);
    }
    for (int i = 0; i < pass.output_count; ++i) {
      const Span mine = part(part({0, pass.output_bytes[i]}, thread, threads), piece, pieces);
      write<kStreaming>(pass.outputs[i], mine, pass.pattern);
    }
  }
#if defined(__SSE2__)
  if (kStreaming) _mm_sfence();
#endif
  const Line sum = sums[0] + sums[1] + sums[2] + sums[3];
  uint64_t total = 0;
  for (size_t i = 0; i < kLine / sizeof(uint64_t); ++i) total += sum[i];
  return total;
}

}  // namespace

extern "C" {

void floor_free(char* output) { std::free(output); }

/// Reads the inputs, and fills newly allocated outputs with `pattern`, on `threads` threads. Sizes are multiples of 64
/// bytes. `checksum` becomes the sum of all 64-bit words read. Returns 0, or 1 where memory is lacking.
int floor_pass(const char* const* inputs, const size_t* input_bytes, int input_count, char** outputs,
               const size_t* output_bytes, int output_count, int streaming, int prefetch, int huge_pages, int threads,
               uint64_t pattern, uint64_t* checksum) {
  for (int i = 0; i < output_count; ++i) outputs[i] = nullptr;
  for (int i = 0; i < output_count; ++i) {
    void* memory = nullptr;
    if (posix_memalign(&memory, huge_pages ? kHugePage : kLine, output_bytes[i]) != 0) {
      for (int j = 0; j < i; ++j) std::free(outputs[j]);
      return 1;
    }
#if defined(MADV_HUGEPAGE)
    if (huge_pages) madvise(memory, output_bytes[i], MADV_HUGEPAGE);
#endif
    outputs[i] = static_cast<char*>(memory);
  }
  const Pass pass{inputs, input_bytes, input_count, outputs, output_bytes, output_count, pattern};
  const auto kernel =
      streaming ? (prefetch ? run<true, true> : run<true, false>) : (prefetch ? run<false, true> : run<false, false>);
  std::vector<uint64_t> totals(threads);
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back([&, t] { totals[t] = kernel(pass, t, threads); });
  totals[0] = kernel(pass, 0, threads);
  for (std::thread& other : others) other.join();
  *checksum = 0;
  for (const uint64_t total : totals) *checksum += total;
  return 0;
}
}
