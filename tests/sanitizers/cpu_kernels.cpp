// Runs the CPU kernels without torch, for sanitizers to watch: every instruction set and element type, forward and
// backward, dense and packed, on several threads, against loops from the definition. `--break FAULT` does one thing
// wrong instead, through the same kernels, for sanitizers to find.
#include <algorithm>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/instruction_set.h"
#include "reference.h"
#include "tensors.h"
#include "threads.h"

namespace llava_st::tests {
namespace {

using cpu::AttentionKernels;
using cpu::AttentionProblem;
using cpu::Element;
using cpu::LoopBody;
using cpu::ParallelLoop;

// Threads -------------------------------------------------------------------------------------------------------------

/// A fault: both threads do everything.
void deal_twice(int64_t n, LoopBody body, void* context) {
  in_threads(2, [=](int64_t) { body(0, n, context); });
}

// Correctness ---------------------------------------------------------------------------------------------------------

template <class T>
constexpr Element kElement = cpu::kElements;
template <>
constexpr Element kElement<float> = cpu::kFloat;
template <>
constexpr Element kElement<double> = cpu::kDouble;
template <>
constexpr Element kElement<BFloat16> = cpu::kBFloat16;
template <>
constexpr Element kElement<Float16> = cpu::kFloat16;
constexpr const char* kElementNames[] = {"float32", "float64", "bfloat16", "float16"};

/// Random numbers that are numbers of type T, so that only what is computed from them is rounded.
template <class T>
Inputs random_inputs(const Case& a, const Layout& layout) {
  std::mt19937 generator(1);
  std::uniform_real_distribution<double> uniform(-2, 2);
  const auto numbers = [&](int64_t rows) {
    std::vector<double> result(static_cast<size_t>(rows * a.heads * a.dim));
    for (double& number : result) number = static_cast<double>(static_cast<T>(uniform(generator)));
    return result;
  };
  const PackedOffset rows = layout.offsets.back();
  return {numbers(rows.query), numbers(rows.key), numbers(rows.key), numbers(rows.query)};
}

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

/// Both passes in every loop: the first one's results against `expected`, the others' against its own.
template <class T>
int64_t check_kernels(const AttentionKernels& kernels, const AttentionProblem& problem, Tensors<T>& tensors,
                      const Results& expected, const std::string& what) {
  Tensor<T>* const results[] = {&tensors.output, &tensors.grad_query, &tensors.grad_key, &tensors.grad_value};
  const Expected* const wanted[] = {&expected.output, &expected.grad_query, &expected.grad_key, &expected.grad_value};
  constexpr const char* kNames[] = {"output", "grad_query", "grad_key", "grad_value"};
  std::vector<char> first[4];
  int64_t runs = 0;
  for (const auto& [loop_name, loop] : kLoops) {
    current = what + ", " + kernels.instruction_set + ", " + loop_name;
    for (Tensor<T>* const result : results) result->fill_with_nan();
    check(kernels.forward[kElement<T>](problem, tensors.forward(), loop), "the forward pass had no memory");
    check(kernels.backward[kElement<T>](problem, tensors.backward(), loop), "the backward pass had no memory");
    for (int i = 0; i < 4; ++i) {
      if (runs == 0) {
        check_close(kNames[i], *results[i], *wanted[i]);
        first[i] = results[i]->contents();
        if (!results[i]->untouched_between_rows()) fail(std::string(kNames[i]) + " is written beside its rows");
      } else if (results[i]->contents() != first[i]) {
        fail(std::string(kNames[i]) + " is not the same as with " + kLoops[0].name);
      }
    }
    ++runs;
  }
  return runs;
}

/// The portable kernels and, where this processor has them, those that torch would use.
std::vector<const AttentionKernels*> instruction_sets() {
  std::vector<const AttentionKernels*> sets = {&cpu::baseline_attention_kernels()};
  if (&cpu::attention_kernels() != sets[0]) sets.push_back(&cpu::attention_kernels());
  return sets;
}

template <class T>
int64_t check_case(const Case& a) {
  const Layout layout(a);
  const Rows queries(layout.query_grids, a.packed), keys(a.grids, a.packed);
  const AttentionProblem problem = problem_of(a, layout);
  const Inputs inputs = random_inputs<T>(a, layout);
  const Results expected = attend(layout.regions, a.heads, a.dim, scale_of(a), kPrecision<T>.computing, inputs);
  int64_t runs = 0;
  for (int view = 0; view < kViews; ++view) {
    Tensors<T> tensors(a, queries, keys, static_cast<View>(view));
    fill(tensors.query, inputs.query);
    fill(tensors.key, inputs.key);
    fill(tensors.value, inputs.value);
    fill(tensors.grad_output, inputs.grad_output);
    const std::string what = std::string(a.name) + ", " + kElementNames[kElement<T>] + ", " + kViewNames[view];
    for (const AttentionKernels* const kernels : instruction_sets()) {
      runs += check_kernels(*kernels, problem, tensors, expected, what);
    }
  }
  return runs;
}

int check_everything() {
  int64_t runs = 0;
  const int64_t grids = check_geometry();
  check_neighbors();
  check_positions();
  for (const Case& a : kCases) {
    runs += check_case<float>(a) + check_case<double>(a) + check_case<BFloat16>(a) + check_case<Float16>(a);
  }
  std::string sets;
  for (const AttentionKernels* const kernels : instruction_sets()) sets += std::string(" ") + kernels->instruction_set;
  std::printf("passed: %lld grids cut into regions; %zu problems in %lld runs, forward and backward, on%s\n",
              static_cast<long long>(grids), kCases.size(), static_cast<long long>(runs), sets.c_str());
  return 0;
}

// Faults --------------------------------------------------------------------------------------------------------------

/// Does the one wrong thing, with the kernels that torch would use (LLAVA_ST_CPU_ISA=baseline: the portable ones), in
/// bfloat16: the smallest elements are the hardest to miss.
int do_wrong(const std::string& fault) {
  const Case a = {"fault", kDense, {{2, 6, 6}}, {1, 3, 3}, 2, 64};
  const Layout layout(a);
  AttentionProblem problem = problem_of(a, layout);
  Tensors<BFloat16> tensors(a, Rows(layout.query_grids, a.packed), Rows(a.grids, a.packed), kContiguous);
  const Inputs inputs = random_inputs<BFloat16>(a, layout);
  fill(tensors.query, inputs.query);
  fill(tensors.key, inputs.key);
  fill(tensors.value, inputs.value);
  fill(tensors.grad_output, inputs.grad_output);
  ParallelLoop loop = {deal<2>, 2};
  bool backward = false;

  if (fault == "read") {
    tensors.value.lose_last_element();
  } else if (fault == "write") {
    tensors.output.lose_last_element();
  } else if (fault == "stream") {
    tensors.grad_key.lose_last_element();
    backward = true;
  } else if (fault == "undefined") {
    problem.grid = {int64_t{1} << 40, int64_t{1} << 40, 1};  // more tokens than 64 bits count
  } else if (fault == "race") {
    loop.run = deal_twice;
  } else if (fault == "streamed race") {
    loop.run = deal_twice;
    backward = true;
  } else if (fault == "memory") {
    problem.largest_region = int64_t{1} << 48;  // no fault: all threads find that there is no scratch memory for it
  } else if (fault != "nothing") {
    std::fprintf(stderr, "no such fault: %s\n", fault.c_str());
    return 2;
  }
  const AttentionKernels& kernels = cpu::attention_kernels();
  const bool done = backward ? kernels.backward[cpu::kBFloat16](problem, tensors.backward(), loop)
                             : kernels.forward[cpu::kBFloat16](problem, tensors.forward(), loop);
  std::printf("%s: %s, and no sanitizer minded\n", kernels.instruction_set, done ? "done" : "no memory");
  return 0;
}

}  // namespace
}  // namespace llava_st::tests

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  if (words.empty()) return llava_st::tests::check_everything();
  if (words.size() == 2 && words[0] == "--break") return llava_st::tests::do_wrong(words[1]);
  std::fprintf(stderr, "usage: %s [--break read|write|stream|undefined|race|\"streamed race\"|memory|nothing]\n",
               arguments[0]);
  return 2;
}
