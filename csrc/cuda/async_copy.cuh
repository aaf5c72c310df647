// Copies from global to shared memory that go on while the thread does something else (sm_80 and later).
//
// Until a copy is waited for, nobody may touch its target. Then the thread that started it may; others after a barrier.
#pragma once

#include "hardware.cuh"

#if !defined(__CUDACC__)
#include "emulated_async_copy.h"
#else

namespace llava_st::cuda {

/// Starts a copy of BYTES (4, 8 or 16), both addresses being multiples of them. Where it is not `wanted` nothing is
/// read and zeros are written.
template <int BYTES>
LLAVA_ST_DEVICE void copy_async(void* shared, const void* global, bool wanted = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int read = wanted ? BYTES : 0;
  if constexpr (BYTES == 16) {  // past the L1 cache, which only this size can
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(read) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(read)
                 : "memory");
  }
}

/// Makes a group of the copies that this thread has started since the last group.
LLAVA_ST_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits for all but the last PENDING groups of this thread.
template <int PENDING>
LLAVA_ST_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace llava_st::cuda

#endif
