// What all CPU kernels are given besides their data: a loop that runs in parallel. And the element types there are.
#pragma once

#include <cstdint>

namespace llava_st::cpu {

/// `loop(n, body, context)` calls `body(begin, end, context)` over parts of [0, n), perhaps on several threads. Kernels
/// take it as a parameter: inside torch it is torch's pool, in the thread sanitizer's tests plain threads.
using LoopBody = void (*)(int64_t begin, int64_t end, void* context);
struct ParallelLoop {
  void (*run)(int64_t n, LoopBody body, void* context);
  int64_t threads;
};

/// Runs `work(begin, end)` over all units in parallel. `work` returns false when it found no memory.
template <class Work>
bool run_parallel(const ParallelLoop& loop, int64_t units, const Work& work) {
  struct Context {
    const Work& work;
    bool failed;
  } context = {work, false};
  loop.run(
      units,
      [](int64_t begin, int64_t end, void* opaque) {
        auto* context = static_cast<Context*>(opaque);
        if (!context->work(begin, end)) __atomic_store_n(&context->failed, true, __ATOMIC_RELAXED);
      },
      &context);
  return !context.failed;
}

/// The element types of the kernels, as tables of kernels are indexed.
enum Element { kFloat, kDouble, kBFloat16, kFloat16, kElements };

}  // namespace llava_st::cpu
