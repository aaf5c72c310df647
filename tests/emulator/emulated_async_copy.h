// What csrc/cuda/async_copy.cuh offers device code, done by the emulator. Included by it, not by itself.
#pragma once

#include "emulated_hardware.h"

namespace llava_st::cuda {

template <int BYTES>
LLAVA_ST_LAYER void copy_async(void* shared, const void* global, bool wanted = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulator::check_alignment(shared, BYTES, "an asynchronous copy");
  emulator::check_alignment(global, BYTES, "an asynchronous copy");
  emulator::copy_async(shared, wanted ? global : nullptr, BYTES);
}

LLAVA_ST_LAYER void commit_copies() { emulator::commit_copies(); }

template <int PENDING>
LLAVA_ST_LAYER void wait_for_copies() {
  emulator::wait_for_copies(PENDING);
}

}  // namespace llava_st::cuda
