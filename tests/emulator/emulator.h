// Runs kernels on a CPU, one fibre per thread, and fails where a GPU would hang or do as it pleases.
//
// Threads run one at a time, in an order drawn from a seed, from one meeting point (a block barrier, a warp collective)
// to the next. So a missing barrier shows as a result that depends on the seed. Every meeting point demands that all
// threads it is for arrive at the same line of the source; a thread that exits or waits elsewhere instead is an error.
// Shared memory starts as NaN. Vector accesses check their alignment. Blocks run one after another.
//
// Not emulated: the order of memory accesses between meeting points, anything that depends on time, hardware limits.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace emulator {

constexpr int kWarpSize = 32;

/// What a kernel did wrong, with the names of the kernel, the block and the threads.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A place in the source.
struct CallSite {
  const char* file;
  int line;

  static constexpr CallSite here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }

  bool operator==(const CallSite& other) const;
  std::string text() const;
};

/// Of launches to come: the order of threads and blocks.
void set_seed(uint64_t seed);

/// Runs `body` as every thread of `blocks` blocks of `threads` threads.
void run(const char* kernel, int64_t blocks, int threads, const std::function<void()>& body);

// For the thread that is running:

int thread_index();
int block_threads();
int64_t block_index();
int64_t block_count();

void block_barrier(CallSite site);

/// Waits for all lanes of the warp at this site; returns what `source` lane sent.
uint64_t exchange(uint64_t sent, int source, const char* what, CallSite site);

/// Shared memory of the block, the same for all its threads, poisoned with NaN at the block's start.
void* shared_memory(size_t bytes, CallSite site);

/// Fails with the thread's name where an address is not a multiple of `bytes`.
void check_alignment(const void* address, size_t bytes, const char* what);

}  // namespace emulator
