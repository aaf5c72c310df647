// normalized_region_attention and its gradient on the CPU.
#include <torch/csrc/stable/library.h>

#include "../normalized_attention_call.h"
#include "attention_host.h"
#include "instruction_set.h"

namespace llava_st {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

/// The kernels' view of a tensor of the query side, or of keys and values, which have no heads.
cpu::Operand operand(const Tensor& tensor) {
  void* const data = const_cast<void*>(tensor.const_data_ptr());  // kernels only write to results
  const int64_t head = tensor.dim() == 6 ? tensor.stride(4) : 0;
  return {data, {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3), head}};
}

cpu::NormalizedProblem problem_of(const NormalizedCall& call) {
  return {cpu::dense_problem(call.batch, call.grid, call.region, call.heads, call.width, 1), call.eps};
}

Tensor normalized_region_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                   std::vector<int64_t> region, double eps) {
  constexpr auto op = "normalized_region_attention";
  const NormalizedCall call = check_normalized(op, query, key, value, region, eps);
  const auto kernel = cpu::attention_kernels().normalized_forward[cpu::element_of(op, {"query", query})];
  Tensor output = cpu::allocate_result(op, "the output", call.query_shape(), query);
  if (output.numel() == 0) return output;
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value);
  const cpu::NormalizedProblem problem = problem_of(call);
  const bool done = kernel(problem, {operand(q), operand(k), operand(v), operand(output)}, cpu::torch_loop());
  cpu::check_scratch(op, done, problem.attention);
  return output;
}

Gradients normalized_region_attention_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                               const Tensor& value, std::vector<int64_t> region, double eps) {
  constexpr auto op = "normalized_region_attention_backward";
  const NormalizedCall call = check_normalized(op, query, key, value, region, eps);
  check_normalized_gradient(op, grad_output, query, call);
  const auto kernel = cpu::attention_kernels().normalized_backward[cpu::element_of(op, {"query", query})];
  const std::vector<int64_t> tokens = {key.sizes().begin(), key.sizes().end()};
  Tensor grad_query = cpu::allocate_result(op, "the gradient of query", call.query_shape(), query);
  Tensor grad_key = cpu::allocate_result(op, "the gradient of key", tokens, key);
  Tensor grad_value = cpu::allocate_result(op, "the gradient of value", tokens, value);
  if (grad_query.numel() == 0) {  // without heads nothing depends on keys and values
    torch::stable::zero_(grad_key);
    torch::stable::zero_(grad_value);
    return {grad_query, grad_key, grad_value};
  }
  const Tensor g = with_contiguous_rows(grad_output);
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value);
  const cpu::NormalizedProblem problem = problem_of(call);
  const bool done = kernel(
      problem,
      {operand(g), operand(q), operand(k), operand(v), operand(grad_query), operand(grad_key), operand(grad_value)},
      cpu::torch_loop());
  cpu::check_scratch(op, done, problem.attention);
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llava_st, CPU, m) {
  m.impl("normalized_region_attention", TORCH_BOX(&normalized_region_attention));
  m.impl("normalized_region_attention_backward", TORCH_BOX(&normalized_region_attention_backward));
}

}  // namespace llava_st
