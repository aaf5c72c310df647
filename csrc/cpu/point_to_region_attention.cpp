// point_to_region_attention and its kin on the CPU: checked tensors in, the kernels' plain view of them, tensors out.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "attention_host.h"
#include "instruction_set.h"

namespace llava_st {
namespace {

using cpu::AttentionProblem;
using cpu::Operand;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of query, key, value and bias

Tensor allocate_gradient(const char* op, const char* name, const Tensor& of) {
  return cpu::allocate_result(op, name, {of.sizes().begin(), of.sizes().end()}, of);
}

/// The kernels' view of a tensor, dense or packed. They only write to results.
Operand operand(const Tensor& tensor) {
  void* const data = const_cast<void*>(tensor.const_data_ptr());
  if (tensor.dim() >= 5) return {data, dense_strides(tensor)};
  return {data, {0, 0, 0, tensor.stride(0), tensor.stride(1)}};
}

Operand operand(const OptionalTensor& tensor) { return tensor ? operand(*tensor) : Operand{}; }

AttentionProblem problem_of(const DenseCall& call) {
  AttentionProblem problem =
      cpu::dense_problem(call.batch, call.grid, call.region, call.heads, call.head_dim, call.scale);
  problem.value_dim = call.value_dim;
  return problem;
}

AttentionProblem problem_of(const PackedCall& call, const PackedGrids& packed) {
  AttentionProblem problem;
  problem.queries = call.queries;
  problem.heads = call.heads;
  problem.head_dim = call.head_dim;
  problem.value_dim = call.value_dim;
  problem.scale = call.scale;
  problem.region = call.region;
  problem.offsets = packed.offsets.data();
  problem.grids = packed.grids.data();
  problem.videos = call.videos;
  for (const Extent& grid : packed.grids) {
    problem.largest_region = std::max(problem.largest_region, cpu::tokens_of_largest_region(grid, call.region));
  }
  return problem;
}

Tensor run_forward(const char* op, const AttentionProblem& problem, const std::vector<int64_t>& output_shape,
                   const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias) {
  const cpu::Forward kernel = cpu::attention_kernels().forward[cpu::element_of(op, {"query", query})];
  Tensor output = cpu::allocate_result(op, "the output", output_shape, query);
  if (output.numel() == 0) return output;
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value);
  const bool done =
      kernel(problem, {operand(q), operand(k), operand(v), operand(output), operand(bias)}, cpu::torch_loop());
  cpu::check_scratch(op, done, problem);
  return output;
}

Gradients run_backward(const char* op, const AttentionProblem& problem, const std::vector<int64_t>& output_shape,
                       const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
                       const OptionalTensor& bias) {
  const cpu::Backward kernel = cpu::attention_kernels().backward[cpu::element_of(op, {"query", query})];
  check_same_kind(op, {"grad_output", grad_output}, {"query", query});
  check_shape(op, {"grad_output", grad_output}, output_shape);
  Tensor grad_query = allocate_gradient(op, "the gradient of query", query);
  Tensor grad_key = allocate_gradient(op, "the gradient of key", key);
  Tensor grad_value = allocate_gradient(op, "the gradient of value", value);
  Tensor grad_bias = bias ? allocate_gradient(op, "the gradient of bias", *bias)
                          : cpu::allocate_result(op, "the gradient of no bias", {0}, query);
  if (grad_query.numel() + grad_output.numel() > 0) {
    const Tensor g = with_contiguous_rows(grad_output);
    const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value);
    const cpu::BackwardOperands operands = {
        operand(g),          operand(q),          operand(k),
        operand(v),          operand(grad_query), operand(grad_key),
        operand(grad_value), operand(bias),       bias ? operand(grad_bias) : Operand{},
    };
    cpu::check_scratch(op, kernel(problem, operands, cpu::torch_loop()), problem);
  } else if (bias) {
    torch::stable::zero_(grad_bias);
  }
  return {grad_query, grad_key, grad_value, grad_bias};
}

Tensor point_to_region_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                 std::vector<int64_t> region, OptionalScale scale, OptionalTensor bias) {
  constexpr auto op = "point_to_region_attention";
  const DenseCall call = check_dense(op, query, key, value, region, scale, bias);
  return run_forward(op, problem_of(call), call.output_shape(), query, key, value, bias);
}

Gradients point_to_region_attention_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                             const Tensor& value, std::vector<int64_t> region, OptionalScale scale,
                                             OptionalTensor bias) {
  constexpr auto op = "point_to_region_attention_backward";
  const DenseCall call = check_dense(op, query, key, value, region, scale, bias);
  return run_backward(op, problem_of(call), call.output_shape(), grad_output, query, key, value, bias);
}

Tensor point_to_region_attention_packed(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const Tensor& grid_thw, std::vector<int64_t> region, OptionalScale scale,
                                        OptionalTensor bias) {
  constexpr auto op = "point_to_region_attention_packed";
  const PackedCall call = check_packed(op, query, key, value, grid_thw, region, scale, bias);
  const PackedGrids packed = read_grids(op, grid_thw, call);
  return run_forward(op, problem_of(call, packed), call.output_shape(), query, key, value, bias);
}

Gradients point_to_region_attention_packed_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                                    const Tensor& value, const Tensor& grid_thw,
                                                    std::vector<int64_t> region, OptionalScale scale,
                                                    OptionalTensor bias) {
  constexpr auto op = "point_to_region_attention_packed_backward";
  const PackedCall call = check_packed(op, query, key, value, grid_thw, region, scale, bias);
  const PackedGrids packed = read_grids(op, grid_thw, call);
  return run_backward(op, problem_of(call, packed), call.output_shape(), grad_output, query, key, value, bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llava_st, CPU, m) {
  m.impl("point_to_region_attention", TORCH_BOX(&point_to_region_attention));
  m.impl("point_to_region_attention_backward", TORCH_BOX(&point_to_region_attention_backward));
  m.impl("point_to_region_attention_packed", TORCH_BOX(&point_to_region_attention_packed));
  m.impl("point_to_region_attention_packed_backward", TORCH_BOX(&point_to_region_attention_packed_backward));
}

}  // namespace llava_st

/// The instruction set of the CPU kernels on this machine, for `python -m llava_st_ops.info`.
extern "C" __attribute__((visibility("default"))) const char* llava_st_cpu_instruction_set() {
  return llava_st::cpu::attention_kernels().instruction_set;
}
