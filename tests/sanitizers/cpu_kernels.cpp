// Runs the CPU kernels without torch, for sanitizers to watch: every instruction set and element type, forward and
// backward, dense and packed, on several threads, against loops from the definition. `--break FAULT` does one thing
// wrong instead, through the same kernels, for sanitizers to find.
#include <algorithm>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention_runs.h"
#include "reference.h"

namespace llava_st::tests {
namespace {

using cpu::AttentionKernels;
using cpu::AttentionProblem;
using cpu::LoopBody;
using cpu::ParallelLoop;

// Threads -------------------------------------------------------------------------------------------------------------

/// A fault: both threads do everything.
void deal_twice(int64_t n, LoopBody body, void* context) {
  in_threads(2, [=](int64_t) { body(0, n, context); });
}

// Correctness ---------------------------------------------------------------------------------------------------------

/// Random numbers that are numbers of type T, so that only what is computed from them is rounded.
template <class T>
Inputs random_inputs(const Case& a, const Layout& layout) {
  std::mt19937 generator(1);
  std::uniform_real_distribution<double> uniform(-2, 2);
  const auto numbers = [&](int64_t rows, int64_t width) {
    std::vector<double> result(static_cast<size_t>(rows * a.heads * width));
    for (double& number : result) number = static_cast<double>(static_cast<T>(uniform(generator)));
    return result;
  };
  const PackedOffset rows = layout.offsets.back();
  Inputs inputs = {numbers(rows.query, a.dim),
                   numbers(rows.key, a.dim),
                   numbers(rows.key, a.value_dim()),
                   numbers(rows.query, a.value_dim()),
                   {}};
  if (!a.biased) return inputs;
  inputs.bias = numbers(rows.key, 1);
  for (double& bias : inputs.bias) bias = bias < -1 ? -INFINITY : bias;
  for (const int64_t token : layout.regions[0]) inputs.bias[static_cast<size_t>(token * a.heads)] = -INFINITY;
  return inputs;
}

template <class T>
void fill_all(Tensors<T>& tensors, const Inputs& inputs) {
  fill(tensors.query, inputs.query);
  fill(tensors.key, inputs.key);
  fill(tensors.value, inputs.value);
  fill(tensors.grad_output, inputs.grad_output);
  if (tensors.biased) fill(tensors.bias, inputs.bias);
}

/// Both passes in every loop.
template <class T>
int64_t check_kernels(const AttentionKernels& kernels, const AttentionProblem& problem, Tensors<T>& tensors,
                      const Results& expected, const std::string& what) {
  std::vector<Written<T>> results = {{"output", tensors.output, expected.output},
                                     {"grad_query", tensors.grad_query, expected.grad_query},
                                     {"grad_key", tensors.grad_key, expected.grad_key},
                                     {"grad_value", tensors.grad_value, expected.grad_value}};
  if (tensors.biased) results.push_back({"grad_bias", tensors.grad_bias, expected.grad_bias});
  return check_in_every_loop(results, what + ", " + kernels.instruction_set, [&](const ParallelLoop& loop) {
    check(kernels.forward[kElement<T>](problem, tensors.forward(), loop), "the forward pass had no memory");
    check(kernels.backward[kElement<T>](problem, tensors.backward(), loop), "the backward pass had no memory");
  });
}

template <class T>
int64_t check_case(const Case& a) {
  const Layout layout(a);
  const Rows queries(layout.query_grids, a.packed), keys(a.grids, a.packed);
  const AttentionProblem problem = problem_of(a, layout);
  const Inputs inputs = random_inputs<T>(a, layout);
  const Results expected =
      attend(layout.regions, a.heads, a.dim, a.value_dim(), scale_of(a), kPrecision<T>.computing, inputs);
  int64_t runs = 0;
  for (int view = 0; view < kViews; ++view) {
    Tensors<T> tensors(a, queries, keys, static_cast<View>(view));
    fill_all(tensors, inputs);
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
  check_gelu();
  check_normalized();
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
  fill_all(tensors, inputs);
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
    check(normalized_without_memory(loop), "attention over normalised keys found memory");
    check(gelu_without_memory(loop), "the GELU found memory");
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
