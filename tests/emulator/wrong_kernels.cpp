// Small kernels with the faults that the emulator must catch, and their right twins.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cuda/hardware.cuh"

namespace py = pybind11;

namespace llava_st::cuda {

constexpr int kThreads = 64;

/// Every thread adds its neighbour's number to its own.
template <bool RIGHT>
LLAVA_ST_GLOBAL void missing_barrier(float* result) {
  LLAVA_ST_SHARED(float, numbers, kThreads);
  const int thread = thread_index();
  numbers[thread] = static_cast<float>(thread);
  if constexpr (RIGHT) block_barrier();
  result[thread] = numbers[thread] + numbers[(thread + 1) % kThreads];
}

/// The second half of the block reads what only the first half wrote.
template <bool RIGHT>
LLAVA_ST_GLOBAL void unwritten_shared_memory(float* result) {
  LLAVA_ST_SHARED(float, numbers, kThreads);
  const int thread = thread_index();
  if (RIGHT || thread < kThreads / 2) numbers[thread] = 1.0f;
  block_barrier();
  result[thread] = numbers[thread];
}

/// One half of the block meets at one barrier, the other at another.
template <bool RIGHT>
LLAVA_ST_GLOBAL void divergent_barrier(float* result) {
  const int thread = thread_index();
  if (RIGHT || thread < kThreads / 2) {
    block_barrier();
  } else {
    block_barrier();
  }
  result[thread] = 1.0f;
}

/// Some threads leave before the barrier.
template <bool RIGHT>
LLAVA_ST_GLOBAL void skipped_barrier(float* result) {
  const int thread = thread_index();
  if (!RIGHT && thread >= 48) return;
  block_barrier();
  result[thread] = 1.0f;
}

/// Odd lanes take part in a shuffle that even lanes know nothing of.
template <bool RIGHT>
LLAVA_ST_GLOBAL void divergent_shuffle(float* result) {
  const int thread = thread_index();
  float number = static_cast<float>(thread);
  if (RIGHT || thread % 2 != 0) number += shuffle_xor(number, 2);
  warp_barrier();
  result[thread] = number;
}

/// A vector load from an odd element.
template <bool RIGHT>
LLAVA_ST_GLOBAL void misaligned_load(float* result) {
  const int thread = thread_index();
  const Words words = load_once(reinterpret_cast<const Words*>(result + (RIGHT ? 0 : 1)), true);
  if (thread == 0) result[8] = float_from_bits(words.word[0]);
}

}  // namespace llava_st::cuda

namespace {

template <auto kernel>
std::vector<float> run(uint64_t seed) {
  emulator::set_seed(seed);
  alignas(16) float memory[llava_st::cuda::kThreads] = {};
  float* const result = memory;
  llava_st::cuda::launch<kernel>({1, llava_st::cuda::kThreads, nullptr}, result);
  return {result, result + llava_st::cuda::kThreads};
}

}  // namespace

#define BIND(kernel)                                                  \
  module.def("wrong_" #kernel, &run<&llava_st::cuda::kernel<false>>); \
  module.def("right_" #kernel, &run<&llava_st::cuda::kernel<true>>)

void bind_wrong_kernels(py::module_& module) {
  py::register_exception<emulator::KernelError>(module, "KernelError", PyExc_RuntimeError);
  BIND(missing_barrier);
  BIND(unwritten_shared_memory);
  BIND(divergent_barrier);
  BIND(skipped_barrier);
  BIND(divergent_shuffle);
  BIND(misaligned_load);
}
