// The thin layer through which device code reaches the hardware. Under nvcc each function is an intrinsic at no cost;
// under a host compiler the emulator in tests/emulator stands in, so that the same kernels run on a CPU.
//
// Kernels use nothing but this: no intrinsic, no threadIdx, no torch.
#pragma once

#include <cstdint>

namespace llava_st::cuda {

/// 16-bit floating point as it lies in memory; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

/// What one vector load or store moves.
struct alignas(16) Words {
  uint32_t word[4];
};

/// What one of half that width moves.
struct alignas(8) WordPair {
  uint32_t word[2];
};

/// A pair of floats, as two 16-bit numbers in one word hold it; `low` comes first in memory.
struct FloatPair {
  float low, high;
};

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffff;

/// A one-dimensional launch; `stream` is a cudaStream_t.
struct LaunchShape {
  int64_t blocks;
  int threads;
  void* stream;
};

}  // namespace llava_st::cuda

#if !defined(__CUDACC__)
#include "emulated_hardware.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define LLAVA_ST_DEVICE __device__ __forceinline__
#define LLAVA_ST_GLOBAL __global__
/// Threads per block, and how many blocks a multiprocessor shall have registers for. Without that number the compiler
/// may spill a little to make room for one block more.
#define LLAVA_ST_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define LLAVA_ST_UNROLL _Pragma("unroll")
/// An array in shared memory, uninitialised.
#define LLAVA_ST_SHARED(type, name, count) __shared__ type name[count]

namespace llava_st::cuda {

LLAVA_ST_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
LLAVA_ST_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
LLAVA_ST_DEVICE int64_t block_index() { return blockIdx.x; }
LLAVA_ST_DEVICE int64_t block_count() { return gridDim.x; }

LLAVA_ST_DEVICE void block_barrier() { __syncthreads(); }

// What the lanes of a warp do together: each names the same `lanes`, and is one of them. The barrier orders accesses to
// memory, the others do not.

LLAVA_ST_DEVICE void warp_barrier(uint32_t lanes = kFullWarp) { __syncwarp(lanes); }

/// The value of lane number `lane`.
template <class T>
LLAVA_ST_DEVICE T shuffle(T value, int lane, uint32_t lanes = kFullWarp) {
  return __shfl_sync(lanes, value, lane);
}

/// The value of the lane whose number differs in the bits of `mask`.
template <class T>
LLAVA_ST_DEVICE T shuffle_xor(T value, int mask, uint32_t lanes = kFullWarp) {
  return __shfl_xor_sync(lanes, value, mask);
}

/// The lanes for which `condition` holds, one bit each.
LLAVA_ST_DEVICE uint32_t ballot(bool condition, uint32_t lanes = kFullWarp) { return __ballot_sync(lanes, condition); }
LLAVA_ST_DEVICE bool any(bool condition, uint32_t lanes = kFullWarp) { return __any_sync(lanes, condition); }
LLAVA_ST_DEVICE bool all(bool condition, uint32_t lanes = kFullWarp) { return __all_sync(lanes, condition); }

/// Adds in one step and returns what was there before. Orders nothing else.
template <class T>
LLAVA_ST_DEVICE T atomic_add(T* to, T value) {
  return ::atomicAdd(to, value);
}

LLAVA_ST_DEVICE float exp2(float x) { return ::exp2f(x); }
LLAVA_ST_DEVICE float log2(float x) { return ::log2f(x); }
LLAVA_ST_DEVICE float erf(float x) { return ::erff(x); }
LLAVA_ST_DEVICE float square_root(float x) { return ::sqrtf(x); }

/// 1 / x to within one unit in the last place.
LLAVA_ST_DEVICE float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

LLAVA_ST_DEVICE float maximum(float a, float b) { return ::fmaxf(a, b); }

LLAVA_ST_DEVICE float float_of(float x) { return x; }
LLAVA_ST_DEVICE float float_of(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
LLAVA_ST_DEVICE float float_of(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

LLAVA_ST_DEVICE void round_to(float& result, float x) { result = x; }
LLAVA_ST_DEVICE void round_to(BFloat16& result, float x) { result.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
LLAVA_ST_DEVICE void round_to(Float16& result, float x) { result.bits = __half_as_ushort(__float2half_rn(x)); }

LLAVA_ST_DEVICE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
LLAVA_ST_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }

LLAVA_ST_DEVICE FloatPair bfloat16_pair(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
LLAVA_ST_DEVICE FloatPair float16_pair(uint32_t word) {
  return {__half2float(__ushort_as_half(static_cast<uint16_t>(word))),
          __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16)))};
}
LLAVA_ST_DEVICE uint32_t bfloat16_word(FloatPair pair) {
  const __nv_bfloat162 rounded = __floats2bfloat162_rn(pair.low, pair.high);
  return __bfloat16_as_ushort(rounded.x) | static_cast<uint32_t>(__bfloat16_as_ushort(rounded.y)) << 16;
}
LLAVA_ST_DEVICE uint32_t float16_word(FloatPair pair) {
  const __half2 rounded = __floats2half2_rn(pair.low, pair.high);
  return __half_as_ushort(__low2half(rounded)) | static_cast<uint32_t>(__half_as_ushort(__high2half(rounded))) << 16;
}

/// The low halves of two words as one word, that of `x` first in memory; and the high halves.
LLAVA_ST_DEVICE uint32_t low_halves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); }
LLAVA_ST_DEVICE uint32_t high_halves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); }

/// The same pointer. The compiler does not look behind it, and so does not take apart what it was calculated from.
template <class T>
LLAVA_ST_DEVICE T* settled(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

/// The same number. What follows from it is calculated where it is needed instead of being kept in registers
/// for as long.
LLAVA_ST_DEVICE int afresh(int number) {
  asm volatile("" : "+r"(number));
  return number;
}
LLAVA_ST_DEVICE int64_t afresh(int64_t number) {
  asm volatile("" : "+l"(number));
  return number;
}

// Loads of what this launch only reads, once: past the L1 cache. Where `wanted` is false nothing is read and the result
// is zero. They are volatile so that they are issued where they stand, many in a row, before the first is waited for.

LLAVA_ST_DEVICE Words load_once(const Words* from, bool wanted) {
  Words to;
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.b32 wanted, %5, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "mov.b32 %2, 0;\n"
      "mov.b32 %3, 0;\n"
      "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=&r"(to.word[0]), "=&r"(to.word[1]), "=&r"(to.word[2]), "=&r"(to.word[3])
      : "l"(from), "r"(static_cast<int>(wanted)));
  return to;
}

LLAVA_ST_DEVICE WordPair load_once(const WordPair* from, bool wanted) {
  WordPair to;
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.b32 wanted, %3, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "@wanted ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n"
      "}\n"
      : "=&r"(to.word[0]), "=&r"(to.word[1])
      : "l"(from), "r"(static_cast<int>(wanted)));
  return to;
}

LLAVA_ST_DEVICE float load_once(const float* from, bool wanted) { return wanted ? __ldg(from) : 0.0f; }
LLAVA_ST_DEVICE BFloat16 load_once(const BFloat16* from, bool wanted) {
  return {wanted ? __ldg(&from->bits) : static_cast<uint16_t>(0)};
}
LLAVA_ST_DEVICE Float16 load_once(const Float16* from, bool wanted) {
  return {wanted ? __ldg(&from->bits) : static_cast<uint16_t>(0)};
}

// The same of what this thread may have written, or may write afterwards.

LLAVA_ST_DEVICE Words load_for_update(const Words* from, bool wanted) {
  Words to;
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.b32 wanted, %5, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "mov.b32 %2, 0;\n"
      "mov.b32 %3, 0;\n"
      "@wanted ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=&r"(to.word[0]), "=&r"(to.word[1]), "=&r"(to.word[2]), "=&r"(to.word[3])
      : "l"(from), "r"(static_cast<int>(wanted))
      : "memory");
  return to;
}

LLAVA_ST_DEVICE WordPair load_for_update(const WordPair* from, bool wanted) {
  WordPair to;
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.b32 wanted, %3, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "@wanted ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n"
      "}\n"
      : "=&r"(to.word[0]), "=&r"(to.word[1])
      : "l"(from), "r"(static_cast<int>(wanted))
      : "memory");
  return to;
}

LLAVA_ST_DEVICE float load_for_update(const float* from, bool wanted) { return wanted ? *from : 0.0f; }
LLAVA_ST_DEVICE BFloat16 load_for_update(const BFloat16* from, bool wanted) { return wanted ? *from : BFloat16{0}; }
LLAVA_ST_DEVICE Float16 load_for_update(const Float16* from, bool wanted) { return wanted ? *from : Float16{0}; }

/// A load of what this launch only reads, many times: kept in the L1 cache.
LLAVA_ST_DEVICE Words load_often(const Words* from) {
  const uint4 to = __ldg(reinterpret_cast<const uint4*>(from));
  return {{to.x, to.y, to.z, to.w}};
}
LLAVA_ST_DEVICE WordPair load_often(const WordPair* from) {
  const uint2 to = __ldg(reinterpret_cast<const uint2*>(from));
  return {{to.x, to.y}};
}
LLAVA_ST_DEVICE float load_often(const float* from) { return __ldg(from); }
LLAVA_ST_DEVICE BFloat16 load_often(const BFloat16* from) { return {__ldg(&from->bits)}; }
LLAVA_ST_DEVICE Float16 load_often(const Float16* from) { return {__ldg(&from->bits)}; }

/// A store of what is soon read again, and one of what is not and may leave the caches first.
template <class T>
LLAVA_ST_DEVICE void store(T* to, T value) {
  *to = value;
}
LLAVA_ST_DEVICE void store(Words* to, Words value) {
  __stwb(reinterpret_cast<uint4*>(to), make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
}
LLAVA_ST_DEVICE void store(WordPair* to, WordPair value) {
  __stwb(reinterpret_cast<uint2*>(to), make_uint2(value.word[0], value.word[1]));
}
template <class T>
LLAVA_ST_DEVICE void store_streaming(T* to, T value) {
  *to = value;
}
LLAVA_ST_DEVICE void store_streaming(Words* to, Words value) {
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
}

/// The most blocks of one launch.
inline int64_t max_blocks() { return 0x7fffffff; }

/// Starts `kernel` on a stream; the caller asks CUDA whether that went well.
template <auto kernel, class... Arguments>
void launch(LaunchShape shape, const Arguments&... arguments) {
  // clang-format off
  kernel<<<static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.threads), 0,
           static_cast<cudaStream_t>(shape.stream)>>>(arguments...);
  // clang-format on
}

}  // namespace llava_st::cuda

#endif
