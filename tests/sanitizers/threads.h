// Parallel loops on threads of their own, which the thread sanitizer sees through; it does not see torch's pool.
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

#include "cpu/parallel_loop.h"

namespace llava_st::tests {

using cpu::LoopBody;
using cpu::ParallelLoop;

/// Calls `work(i)` for i < threads, each in a thread of its own. Nothing but start and end orders what they do.
template <class Work>
void in_threads(int64_t threads, const Work& work) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(int64_t{0});
  for (std::thread& thread : others) thread.join();
}

/// Deals out chunks of `chunk` units in turn; 0 makes one chunk per thread, like torch. (A shared counter would deal
/// more evenly, but perhaps all to one thread.)
template <int64_t threads, int64_t chunk = 0>
void deal(int64_t n, LoopBody body, void* context) {
  const int64_t size = chunk > 0 ? chunk : (n + threads - 1) / threads;
  in_threads(threads, [=](int64_t thread) {
    for (int64_t begin = thread * size; begin < n; begin += threads * size) {
      body(begin, std::min(begin + size, n), context);
    }
  });
}

struct NamedLoop {
  const char* name;
  ParallelLoop loop;
};
inline constexpr NamedLoop kLoops[] = {
    {"1 thread", {deal<1>, 1}},
    {"5 threads", {deal<5>, 5}},
    {"2 threads, chunks of 3 units", {deal<2, 3>, 2}},
};

}  // namespace llava_st::tests
