// How the kernels of attention are run and their results compared.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "cpu/instruction_set.h"
#include "reference.h"
#include "tensors.h"
#include "threads.h"

namespace llava_st::tests {

template <class T>
void fill(Tensor<T>& tensor, const std::vector<double>& numbers) {
  tensor.for_elements([&](size_t i, T& element) { element = static_cast<T>(numbers[i]); });
}

template <class T>
void check_close(const char* name, Tensor<T>& actual, const Expected& expected) {
  constexpr Precision precision = kPrecision<T>;
  actual.for_elements([&](size_t i, T& element) {
    const Real got = static_cast<double>(element), want = expected.value[i], off = expected.error[i];
    const Real allowed = off + precision.unit * (std::fabs(want) + off) + precision.tiny;
    if (std::fabs(got - want) <= allowed) return;  // not of NaN
    fail(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(got) + " instead of " +
         std::to_string(want) + ", allowed to be off by " + std::to_string(allowed));
  });
}

/// A tensor that kernels write, and what should be in it.
template <class T>
struct Written {
  const char* name;
  Tensor<T>& tensor;
  const Expected& expected;
};

/// Calls `run(loop)` with every loop: the first one's results against what is expected, the others' against its own.
/// Returns how many there were.
template <class T, class Run>
int64_t check_in_every_loop(const std::vector<Written<T>>& results, const std::string& what, const Run& run) {
  std::vector<std::vector<char>> first;
  int64_t runs = 0;
  for (const auto& [loop_name, loop] : kLoops) {
    current = what + ", " + loop_name;
    for (const Written<T>& result : results) result.tensor.fill_with_nan();
    run(loop);
    for (size_t i = 0; i < results.size(); ++i) {
      const auto& [name, tensor, expected] = results[i];
      if (runs == 0) {
        check_close(name, tensor, expected);
        first.push_back(tensor.contents());
        if (!tensor.untouched_between_rows()) fail(std::string(name) + " is written beside its rows");
      } else if (tensor.contents() != first[i]) {
        fail(std::string(name) + " is not the same as with " + kLoops[0].name);
      }
    }
    ++runs;
  }
  return runs;
}

/// The portable kernels and, where this processor has them, those that torch would use.
inline std::vector<const cpu::AttentionKernels*> instruction_sets() {
  std::vector<const cpu::AttentionKernels*> sets = {&cpu::baseline_attention_kernels()};
  if (&cpu::attention_kernels() != sets[0]) sets.push_back(&cpu::attention_kernels());
  return sets;
}

}  // namespace llava_st::tests
