// Small kernels with the faults that the emulator must catch (RIGHT is false), and their right twins.
//
// Each runs with two warps per block. It reads `input`, kZooInputs floats, and writes `result`, kZooResults floats, the
// first entries of which hold a number per thread.
#pragma once

#include <cstring>

#include "cuda/async_copy.cuh"
#include "cuda/elements.cuh"
#include "cuda/matrix_product.cuh"

namespace llava_st::cuda::zoo {

constexpr int kThreads = 64;
constexpr int kInputs = 384;
constexpr int kResults = 128;

LLAVA_ST_DEVICE int lane() { return thread_index() % kWarpSize; }
LLAVA_ST_DEVICE int neighbour() { return (thread_index() + 1) % kThreads; }

// Barriers ----------------------------------------------------------------------------------------------------------

/// Every thread adds its neighbour's number to its own.
template <bool RIGHT>
LLAVA_ST_GLOBAL void missing_barrier(const float* input, float* result) {
  LLAVA_ST_SHARED(float, numbers, kThreads);
  numbers[thread_index()] = input[thread_index()];
  if constexpr (RIGHT) block_barrier();
  result[thread_index()] = numbers[thread_index()] + numbers[neighbour()];
}

/// The same among the lanes of each warp.
template <bool RIGHT>
LLAVA_ST_GLOBAL void missing_warp_barrier(const float* input, float* result) {
  LLAVA_ST_SHARED(float, numbers, kThreads);
  numbers[thread_index()] = input[thread_index()];
  if constexpr (RIGHT) warp_barrier();
  result[thread_index()] = numbers[thread_index()] + numbers[thread_index() ^ 1];
}

/// A barrier of each warp, where threads of the other warp are read.
template <bool RIGHT>
LLAVA_ST_GLOBAL void barrier_too_small(const float* input, float* result) {
  LLAVA_ST_SHARED(float, numbers, kThreads);
  numbers[thread_index()] = input[thread_index()];
  if constexpr (RIGHT) {
    block_barrier();
  } else {
    warp_barrier();
  }
  result[thread_index()] = numbers[thread_index()] + numbers[neighbour()];
}

/// Shared memory is filled a second time while others may still read it.
template <bool RIGHT>
LLAVA_ST_GLOBAL void refilled_too_early(const float* input, float* result) {
  LLAVA_ST_SHARED(float, numbers, kThreads);
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    numbers[thread_index()] = input[round * kThreads + thread_index()];
    block_barrier();
    sum += numbers[neighbour()];
    if constexpr (RIGHT) block_barrier();
  }
  result[thread_index()] = sum;
}

/// One warp meets at one barrier, the other at another.
template <bool RIGHT>
LLAVA_ST_GLOBAL void divergent_barrier(const float* input, float* result) {
  if (RIGHT || thread_index() < kWarpSize) {
    block_barrier();
  } else {
    block_barrier();
  }
  result[thread_index()] = input[thread_index()];
}

/// Some threads leave before the barrier.
template <bool RIGHT>
LLAVA_ST_GLOBAL void skipped_barrier(const float* input, float* result) {
  result[thread_index()] = input[thread_index()];
  if (!RIGHT && thread_index() >= 48) return;
  block_barrier();
}

/// One thread overwrites what a thread of the other warp read last but many.
template <bool RIGHT>
LLAVA_ST_GLOBAL void forgotten_reader(const float* input, float* result) {
  LLAVA_ST_SHARED(float, number, 1);
  if (thread_index() == 0) number[0] = input[0];
  block_barrier();
  float sum = input[thread_index()];
  if (thread_index() <= kWarpSize) sum += number[0];
  if constexpr (RIGHT) {
    block_barrier();
  } else {
    warp_barrier();
  }
  if (thread_index() == 0) number[0] = 0.0f;
  result[thread_index()] = sum;
}

// Warp collectives --------------------------------------------------------------------------------------------------

/// Odd lanes take part in a shuffle that even lanes know nothing of.
template <bool RIGHT>
LLAVA_ST_GLOBAL void divergent_shuffle(const float* input, float* result) {
  float number = input[thread_index()];
  if (RIGHT || lane() % 2 != 0) number += shuffle_xor(number, 2);
  warp_barrier();
  result[thread_index()] = number;
}

/// Half of a warp shuffles, and names the whole warp.
template <bool RIGHT>
LLAVA_ST_GLOBAL void wrong_shuffle_mask(const float* input, float* result) {
  float number = input[thread_index()];
  if (lane() < 16) number += shuffle_xor(number, 1, RIGHT ? 0xffff : kFullWarp);
  result[thread_index()] = number;
}

/// Half of a warp shuffles among itself, and reads from the other half.
template <bool RIGHT>
LLAVA_ST_GLOBAL void shuffle_from_absent_lane(const float* input, float* result) {
  float number = input[thread_index()];
  if (lane() < 16) number += shuffle(number, (lane() + 1) % (RIGHT ? 16 : 32), 0xffff);
  result[thread_index()] = number;
}

/// Lanes vote that are not among those they name.
template <bool RIGHT>
LLAVA_ST_GLOBAL void vote_of_strangers(const float* input, float* result) {
  float number = input[thread_index()];
  if (!RIGHT || lane() < 16) number += static_cast<float>(ballot(lane() % 2 == 0, 0xffff));
  result[thread_index()] = number;
}

// Memory ------------------------------------------------------------------------------------------------------------

/// One warp reads what only the other wrote a part of.
template <bool RIGHT>
LLAVA_ST_GLOBAL void unwritten_shared_memory(const float* input, float* result) {
  LLAVA_ST_SHARED(float, numbers, kThreads);
  if (RIGHT || thread_index() < 48) numbers[thread_index()] = input[thread_index()];
  block_barrier();
  result[thread_index()] = numbers[neighbour()];
}

/// A result is read that no kernel wrote.
template <bool RIGHT>
LLAVA_ST_GLOBAL void unwritten_result(const float* input, float* result) {
  if constexpr (RIGHT) result[thread_index()] = 0.0f;
  result[thread_index()] += input[thread_index()];
}

/// A vector load from an odd element.
template <bool RIGHT>
LLAVA_ST_GLOBAL void misaligned_load(const float* input, float* result) {
  const Words words = load_once(reinterpret_cast<const Words*>(input + 4 * thread_index() + (RIGHT ? 0 : 1)), true);
  result[thread_index()] = float_from_bits(words.word[0]);
}

/// The last thread stores past the end.
template <bool RIGHT>
LLAVA_ST_GLOBAL void off_by_one_store(const float* input, float* result) {
  float* const end = result + kResults;
  store(end - 1 - thread_index() + (RIGHT ? 0 : 1), input[thread_index()]);
  result[thread_index()] = input[thread_index()];
}

/// The first thread loads from before the beginning.
template <bool RIGHT>
LLAVA_ST_GLOBAL void off_by_one_load(const float* input, float* result) {
  result[thread_index()] = input[thread_index() - (RIGHT ? 0 : 1)];
}

/// A kernel changes what it was given to read.
template <bool RIGHT>
LLAVA_ST_GLOBAL void written_input(const float* input, float* result) {
  float* const to = RIGHT ? result : const_cast<float*>(input);
  to[thread_index()] = input[thread_index()];
  result[thread_index()] = input[thread_index()];
}

/// All threads of all blocks add to one number.
template <bool RIGHT>
LLAVA_ST_GLOBAL void lost_update(const float* input, float* result) {
  if constexpr (RIGHT) {
    atomic_add(result + kThreads, input[thread_index()]);
  } else {
    result[kThreads] += input[thread_index()];
  }
}

/// A thread reads a sum to which all threads of the other warp have added, and its own warp last.
template <bool RIGHT>
LLAVA_ST_GLOBAL void forgotten_adder(const float* input, float* result) {
  result[thread_index()] = input[thread_index()];
  if (thread_index() <= kWarpSize) atomic_add(result + kThreads, 1.0f);
  if constexpr (RIGHT) {
    block_barrier();
  } else {
    warp_barrier();
  }
  if (thread_index() == 0) result[0] = result[kThreads];
}

/// Elements of 32 bytes: more than one instruction moves.
struct alignas(32) Wide {
  float number[8];
};

/// The last thread stores a wide element past the end.
template <bool RIGHT>
LLAVA_ST_GLOBAL void wide_store_past_the_end(const float* input, float* result) {
  Wide wide;
  for (int i = 0; i < 8; ++i) wide.number[i] = input[thread_index() % 16];
  auto* const to = reinterpret_cast<Wide*>(result);
  if (thread_index() < (RIGHT ? 16 : 17)) store(to + thread_index(), wide);
}

/// All threads copy to the same place.
template <bool RIGHT>
LLAVA_ST_GLOBAL void copies_collide(const float* input, float* result) {
  const int at = RIGHT ? 2 * thread_index() : 0;
  memcpy(result + at, input + at, 2 * sizeof(float));
}

/// A kernel loads what it stores itself, past the caches in which that may still be.
template <bool RIGHT>
LLAVA_ST_GLOBAL void result_loaded_as_read_only(const float* input, float* result) {
  result[thread_index()] = input[thread_index()];
  block_barrier();
  const float* const from = result + neighbour();
  result[kThreads + thread_index()] = RIGHT ? load_for_update(from, true) : load_once(from, true);
}

/// Two blocks write the same numbers.
template <bool RIGHT>
LLAVA_ST_GLOBAL void blocks_write_the_same(const float* input, float* result) {
  const int64_t at = (RIGHT ? block_index() * kThreads : 0) + thread_index();
  result[at] = input[thread_index()];
}

/// A sum overflows before it is used.
template <bool RIGHT>
LLAVA_ST_GLOBAL void integer_overflow(const float* input, float* result) {
  const int large = 0x7fffffff - (RIGHT ? kThreads : 0);
  const int sum = large + static_cast<int>(input[thread_index()]);
  result[thread_index()] = static_cast<float>(sum - large);
}

/// An array of the thread's own is overrun through a pointer. AddressSanitizer alone sees that.
template <bool RIGHT>
LLAVA_ST_GLOBAL void overrun_local_array(const float* input, float* result) {
  float numbers[4];
  float* volatile to = numbers;
  for (int i = 0; i < (RIGHT ? 4 : 5); ++i) to[i] = input[thread_index() + i];
  result[thread_index()] = numbers[0] + numbers[3];
}

// Asynchronous copies -----------------------------------------------------------------------------------------------

/// A thread uses what it copies before it has waited.
template <bool RIGHT>
LLAVA_ST_GLOBAL void unwaited_copy(const float* input, float* result) {
  LLAVA_ST_SHARED(float, numbers, kThreads);
  copy_async<4>(numbers + thread_index(), input + thread_index());
  commit_copies();
  if constexpr (RIGHT) wait_for_copies<0>();
  result[thread_index()] = numbers[thread_index()];
  if constexpr (!RIGHT) wait_for_copies<0>();
}

/// The copy is in none of the groups that are waited for.
template <bool RIGHT>
LLAVA_ST_GLOBAL void uncommitted_copy(const float* input, float* result) {
  LLAVA_ST_SHARED(float, numbers, kThreads);
  copy_async<4>(numbers + thread_index(), input + thread_index());
  if constexpr (RIGHT) commit_copies();
  wait_for_copies<0>();
  result[thread_index()] = numbers[thread_index()];
}

/// Of two copies the second is used, and only the first waited for.
template <bool RIGHT>
LLAVA_ST_GLOBAL void too_many_copies_pending(const float* input, float* result) {
  LLAVA_ST_SHARED(float, numbers, 2 * kThreads);
  for (int round = 0; round < 2; ++round) {
    copy_async<4>(numbers + round * kThreads + thread_index(), input + round * kThreads + thread_index());
    commit_copies();
  }
  wait_for_copies<1>();
  result[thread_index()] = numbers[(RIGHT ? 0 : kThreads) + thread_index()];
  wait_for_copies<0>();
}

/// Every thread waits for its own copy and uses its neighbour's.
template <bool RIGHT>
LLAVA_ST_GLOBAL void copy_without_barrier(const float* input, float* result) {
  LLAVA_ST_SHARED(Words, numbers, kThreads);
  copy_async<16>(numbers + thread_index(), input + 4 * thread_index());
  commit_copies();
  wait_for_copies<0>();
  if constexpr (RIGHT) block_barrier();
  result[thread_index()] = float_from_bits(numbers[neighbour()].word[0]);
}

/// The target is overwritten while others may still read what was there.
template <bool RIGHT>
LLAVA_ST_GLOBAL void copy_started_too_early(const float* input, float* result) {
  LLAVA_ST_SHARED(float, numbers, kThreads);
  numbers[thread_index()] = input[thread_index()];
  block_barrier();
  const float before = numbers[neighbour()];
  if constexpr (RIGHT) block_barrier();
  copy_async<4>(numbers + thread_index(), input + kThreads + thread_index(), thread_index() % 2 == 0);
  commit_copies();
  wait_for_copies<0>();
  result[thread_index()] = before + numbers[thread_index()];
}

/// Another thread overwrites what is being copied.
template <bool RIGHT>
LLAVA_ST_GLOBAL void copied_while_it_changes(const float* input, float* result) {
  LLAVA_ST_SHARED(float, numbers, 1);
  result[thread_index()] = input[thread_index()];
  block_barrier();
  if (thread_index() == 0) {
    copy_async<4>(numbers, result);
    commit_copies();
    if constexpr (RIGHT) wait_for_copies<0>();
  }
  block_barrier();
  if (thread_index() == kWarpSize) result[0] = input[1];
  if constexpr (!RIGHT) wait_for_copies<0>();
}

/// Asynchronous copies go from global to shared memory only.
template <bool RIGHT>
LLAVA_ST_GLOBAL void copy_to_global_memory(const float* input, float* result) {
  LLAVA_ST_SHARED(float, numbers, kThreads);
  copy_async<4>((RIGHT ? numbers : result) + thread_index(), input + thread_index());
  commit_copies();
  wait_for_copies<0>();
  if constexpr (RIGHT) result[thread_index()] = numbers[thread_index()];
}

/// Sixteen bytes are copied to an array that is aligned to four.
template <bool RIGHT>
LLAVA_ST_GLOBAL void copy_to_unaligned_array(const float* input, float* result) {
  LLAVA_ST_SHARED(float, loose, 4 * kThreads);
  LLAVA_ST_SHARED(Words, aligned, kThreads);
  float* const numbers = RIGHT ? reinterpret_cast<float*>(aligned) : loose;
  copy_async<16>(numbers + 4 * thread_index(), input + 4 * thread_index());
  commit_copies();
  wait_for_copies<0>();
  result[thread_index()] = numbers[4 * thread_index()];
}

// Matrix products ---------------------------------------------------------------------------------------------------

/// The product of a 16 x 16 and a 16 x 8 matrix. The wrong one takes the four words of A row by row.
template <bool RIGHT, class T>
LLAVA_ST_DEVICE void multiply(const float* input, float* result) {
  const float* const a = input;
  const float* const b = input + 256;
  const int group = lane() / 4, pair = 2 * (lane() % 4);
  const auto word = [](float low, float high) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      return bfloat16_word({low, high});
    } else {
      return float16_word({low, high});
    }
  };
  uint32_t left[4], right[2];
  for (int half = 0; half < 2; ++half) {
    const int k = pair + 8 * half;
    const int upper = RIGHT ? 2 * half : half, lower = RIGHT ? 2 * half + 1 : half + 2;
    left[upper] = word(a[group * 16 + k], a[group * 16 + k + 1]);
    left[lower] = word(a[(group + 8) * 16 + k], a[(group + 8) * 16 + k + 1]);
    right[half] = word(b[k * 8 + group], b[(k + 1) * 8 + group]);
  }
  float sums[4] = {};
  multiply_add_16x8x16<T>(sums, left, right);
  if (thread_index() >= kWarpSize) return;
  for (int i = 0; i < 4; ++i) result[(group + i / 2 * 8) * 8 + pair + i % 2] = sums[i];
}

template <bool RIGHT>
LLAVA_ST_GLOBAL void wrong_fragments_bfloat16(const float* input, float* result) {
  multiply<RIGHT, BFloat16>(input, result);
}

template <bool RIGHT>
LLAVA_ST_GLOBAL void wrong_fragments_float16(const float* input, float* result) {
  multiply<RIGHT, Float16>(input, result);
}

/// Some lanes do not take part in the product.
template <bool RIGHT>
LLAVA_ST_GLOBAL void product_without_all_lanes(const float* input, float* result) {
  if (RIGHT || lane() < 24) multiply<true, BFloat16>(input, result);
}

/// The zoo: calls `visit.operator()<wrong, right>(name, blocks)` for each.
template <class Visit>
void visit_zoo(Visit&& visit) {
#define LLAVA_ST_ZOO(kernel, blocks) visit.template operator()<&kernel<false>, &kernel<true>>(#kernel, blocks)
  LLAVA_ST_ZOO(missing_barrier, 1);
  LLAVA_ST_ZOO(missing_warp_barrier, 1);
  LLAVA_ST_ZOO(barrier_too_small, 1);
  LLAVA_ST_ZOO(refilled_too_early, 1);
  LLAVA_ST_ZOO(forgotten_reader, 1);
  LLAVA_ST_ZOO(divergent_barrier, 1);
  LLAVA_ST_ZOO(skipped_barrier, 1);
  LLAVA_ST_ZOO(divergent_shuffle, 1);
  LLAVA_ST_ZOO(wrong_shuffle_mask, 1);
  LLAVA_ST_ZOO(shuffle_from_absent_lane, 1);
  LLAVA_ST_ZOO(vote_of_strangers, 1);
  LLAVA_ST_ZOO(unwritten_shared_memory, 1);
  LLAVA_ST_ZOO(unwritten_result, 1);
  LLAVA_ST_ZOO(misaligned_load, 1);
  LLAVA_ST_ZOO(off_by_one_store, 1);
  LLAVA_ST_ZOO(off_by_one_load, 1);
  LLAVA_ST_ZOO(written_input, 1);
  LLAVA_ST_ZOO(lost_update, 2);
  LLAVA_ST_ZOO(forgotten_adder, 1);
  LLAVA_ST_ZOO(wide_store_past_the_end, 1);
  LLAVA_ST_ZOO(copies_collide, 1);
  LLAVA_ST_ZOO(result_loaded_as_read_only, 1);
  LLAVA_ST_ZOO(blocks_write_the_same, 2);
  LLAVA_ST_ZOO(integer_overflow, 1);
  LLAVA_ST_ZOO(overrun_local_array, 1);
  LLAVA_ST_ZOO(unwaited_copy, 1);
  LLAVA_ST_ZOO(uncommitted_copy, 1);
  LLAVA_ST_ZOO(too_many_copies_pending, 1);
  LLAVA_ST_ZOO(copy_without_barrier, 1);
  LLAVA_ST_ZOO(copy_started_too_early, 1);
  LLAVA_ST_ZOO(copied_while_it_changes, 1);
  LLAVA_ST_ZOO(copy_to_global_memory, 1);
  LLAVA_ST_ZOO(copy_to_unaligned_array, 1);
  LLAVA_ST_ZOO(wrong_fragments_bfloat16, 1);
  LLAVA_ST_ZOO(wrong_fragments_float16, 1);
  LLAVA_ST_ZOO(product_without_all_lanes, 1);
#undef LLAVA_ST_ZOO
}

}  // namespace llava_st::cuda::zoo
