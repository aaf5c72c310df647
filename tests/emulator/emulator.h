// Runs CUDA kernels on a CPU, one fibre per thread, and fails where a GPU would hang or do as it pleases.
//
// Threads run one at a time, in an order drawn from a seed, from one meeting point (a block barrier, a warp collective)
// to the next. A meeting point demands that all threads it is for arrive at the same place of the source; a thread that
// exits or waits elsewhere instead is an error. Every access to memory is checked (memory.h): the compiler reports them
// all, because kernels are compiled with its instrumentation for ThreadSanitizer, whose runtime instrumentation.cpp
// replaces. docs/testing-without-a-gpu.md tells the whole story.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <source_location>
#include <stdexcept>
#include <string>

namespace emulator {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffff;

/// What a kernel did wrong, with the names of the kernel, the block and the threads.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using CallSite = std::source_location;

// For the host ------------------------------------------------------------------------------------------------------

struct Settings {
  uint64_t seed = 0;  // of the next launch; every launch draws another one after it
  int64_t max_blocks = 0x7fffffff;
  bool tensors_on_device = true;  // whether launchers take tensors on the CPU to be on the device
};

Settings& settings();

/// How often each kernel was launched.
std::map<std::string, int64_t>& launches();

/// Memory that kernels may use, until `forget_memory`. What is neither this, nor shared memory, nor a thread's own
/// stack is out of bounds.
void allow_reading(const void* data, size_t bytes);
void allow_writing(void* data, size_t bytes);
void allow_updating(void* data, size_t bytes);  // there is something in it
void forget_memory();

/// Copies into memory that may be written, from the host.
void copy_to_device(void* to, const void* from, size_t bytes);

/// Throws if a launcher had undefined behaviour.
void check_launchers();

/// Only one thread of the host at a time may use the emulator.
std::mutex& lock();

/// Runs `body(arguments)` as every thread of `blocks` blocks of `threads` threads.
void run(const char* kernel, int64_t blocks, int threads, void (*body)(const void*), const void* arguments);

// For the thread that is running ------------------------------------------------------------------------------------

int thread_index();
int block_threads();
int64_t block_index();
int64_t block_count();

void block_barrier(CallSite site);

/// What the lanes of a warp do together: `complete` gets what each lane brought, null where a lane takes no part, and
/// changes it to what the lane takes away.
using Complete = void (*)(void* const (&brought)[kWarpSize]);

/// Waits for `lanes` of the warp at this site and completes the collective. Only barriers order memory.
void meet_in_warp(uint32_t lanes, const char* what, CallSite site, void* brought, Complete complete,
                  bool orders_memory = false);

/// Ends the launch, once the running thread stops, with an error that names the kernel, block and thread.
void note_error(const char* what);

/// Shared memory of the block, the same for all its threads; nobody has written it at the block's start. It is aligned
/// to `alignment` and no more.
void* shared_memory(size_t bytes, size_t alignment, const char* name, CallSite site);

/// Fails where an address is not a multiple of `bytes`.
void check_alignment(const void* address, size_t bytes, const char* what);

// Accesses that the layer makes: announced to the emulator, and made out of sight of the compiler's instrumentation.

void announce_load(const void* address, size_t bytes);  // read-only
void announce_read(const void* address, size_t bytes);
void announce_store(void* address, size_t bytes);
void announce_atomic(void* address, size_t bytes);

template <class T>
__attribute__((no_sanitize("thread"), noinline)) T load(const T* from) {
  return *from;
}
template <class T>
__attribute__((no_sanitize("thread"), noinline)) void store(T* to, T value) {
  *to = value;
}
template <class T>
__attribute__((no_sanitize("thread"), noinline)) T add(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}

/// Starts a copy from global to shared memory; zeros where `from` is null. Until it is waited for nobody may touch
/// `to`, or write to `from`.
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
/// Waits for all but the last `pending` groups of this thread's copies.
void wait_for_copies(int pending);

}  // namespace emulator
