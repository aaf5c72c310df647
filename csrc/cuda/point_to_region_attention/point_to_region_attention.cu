// point_to_region_attention and its kin on CUDA: checked tensors in, launches on the current stream, tensors out.
#include "../../attention_call.h"
#include "../element_types.h"
#include "../packed_grids.h"
#include "dispatch.h"

namespace llava_st {

namespace cuda {

// Instantiated in a file each.
extern template void launch_forward(const ForwardArguments<float>&, void*);
extern template void launch_forward(const ForwardArguments<Float16>&, void*);
extern template void launch_forward(const ForwardArguments<BFloat16>&, void*);
extern template void launch_backward(const BackwardArguments<float>&, void*);
extern template void launch_backward(const BackwardArguments<Float16>&, void*);
extern template void launch_backward(const BackwardArguments<BFloat16>&, void*);

}  // namespace cuda

namespace {

using cuda::AttentionProblem;
using cuda::Device;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of query, key, value and bias

TokenStrides strides_of(const Tensor& tensor) {
  return cuda::strides_that_count(tensor.sizes().data(), tensor.strides().data(), tensor.dim() <= 3);
}

/// The kernels' view of a tensor, dense or packed.
template <class T>
cuda::Operand<const T> input_operand(const Tensor& tensor) {
  return {cuda::input_data<T>(tensor), strides_of(tensor)};
}
template <class T>
cuda::Operand<T> result_operand(Tensor& tensor) {
  return {cuda::result_data<T>(tensor), strides_of(tensor)};
}

Tensor allocate_gradient(const char* op, const char* name, const Tensor& of) {
  return allocate(op, name, {of.sizes().begin(), of.sizes().end()}, of);
}

void check_places(const char* op, Extent region) {
  LLAVA_ST_CHECK(cuda::fits_places(region), op,
                 ": regions of 2^31 tokens or more along one axis are not supported, got ",
                 to_text(std::vector<int64_t>{region.t, region.h, region.w}));
}

AttentionProblem problem_of(const char* op, const DenseCall& call) {
  check_places(op, cuda::clip(call.region, call.grid));
  return cuda::dense_problem(call.batch, call.grid, call.region, call.heads, call.head_dim, call.value_dim, call.scale);
}

/// A packed problem and the device memory for where its videos begin.
struct PackedProblem {
  DeviceGrids grids;
  AttentionProblem attention;

  AttentionProblem attention_of(const char* op, const PackedCall& call, Extent longest) {
    check_places(op, cuda::clip(call.region, longest));
    return cuda::packed_problem(call.queries, grids.videos(), longest, call.region, call.heads, call.head_dim,
                                call.value_dim, call.scale);
  }

  PackedProblem(const char* op, const PackedCall& call, const Tensor& query, const Tensor& grid_thw, void* stream)
      : grids(op, call.videos, call.keys, query) {
    if (cuda::on_host(grid_thw)) {
      const PackedGrids packed = read_grids(op, grid_thw, call);
      attention = attention_of(op, call, longest_of(packed.grids));
      grids.upload(op, packed, "query", stream);
    } else {
      attention = attention_of(op, call, {call.keys, call.keys, call.keys});
      grids.locate(grid_thw, attention.region, stream);
    }
  }
};

Tensor run_forward(const char* op, const AttentionProblem& problem, const std::vector<int64_t>& output_shape,
                   const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias,
                   void* stream) {
  Tensor output = allocate(op, "the output", output_shape, query);
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value);
  with_element(op, {"query", query}, [&](auto element) {
    using T = decltype(element);
    const cuda::ForwardArguments<T> arguments = {
        problem,
        input_operand<T>(q),
        input_operand<T>(k),
        input_operand<T>(v),
        cuda::result_data<T>(output),
        bias ? input_operand<T>(*bias) : cuda::Operand<const T>{},
    };
    cuda::launch_forward(arguments, stream);
  });
  cuda::check_launches();
  return output;
}

void check_grad_output(const char* op, const Tensor& grad_output, const Tensor& query,
                       const std::vector<int64_t>& output_shape) {
  check_same_kind(op, {"grad_output", grad_output}, {"query", query});
  check_shape(op, {"grad_output", grad_output}, output_shape);
}

Gradients run_backward(const char* op, const AttentionProblem& problem, const Tensor& grad_output, const Tensor& query,
                       const Tensor& key, const Tensor& value, const OptionalTensor& bias, void* stream) {
  Tensor grad_query = allocate_gradient(op, "the gradient of query", query);
  Tensor grad_key = allocate_gradient(op, "the gradient of key", key);
  Tensor grad_value = allocate_gradient(op, "the gradient of value", value);
  Tensor grad_bias =
      bias ? allocate_gradient(op, "the gradient of bias", *bias) : allocate(op, "the gradient of no bias", {0}, query);
  if (problem.head_dim + problem.value_dim == 0) torch::stable::zero_(grad_bias);  // no kernel will run
  const Tensor g = with_contiguous_rows(grad_output);
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value);
  with_element(op, {"query", query}, [&](auto element) {
    using T = decltype(element);
    const cuda::BackwardArguments<T> arguments = {
        problem,
        input_operand<T>(g),
        input_operand<T>(q),
        input_operand<T>(k),
        input_operand<T>(v),
        cuda::result_data<T>(grad_query),
        result_operand<T>(grad_key),
        result_operand<T>(grad_value),
        bias ? input_operand<T>(*bias) : cuda::Operand<const T>{},
        bias ? result_operand<T>(grad_bias) : cuda::Operand<T>{},
    };
    cuda::launch_backward(arguments, stream);
  });
  cuda::check_launches();
  return {grad_query, grad_key, grad_value, grad_bias};
}

Tensor point_to_region_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                 std::vector<int64_t> region, OptionalScale scale, OptionalTensor bias) {
  constexpr auto op = "point_to_region_attention";
  const DenseCall call = check_dense(op, query, key, value, region, scale, bias);
  const Device device(query);
  return run_forward(op, problem_of(op, call), call.output_shape(), query, key, value, bias, device.stream);
}

Gradients point_to_region_attention_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                             const Tensor& value, std::vector<int64_t> region, OptionalScale scale,
                                             OptionalTensor bias) {
  constexpr auto op = "point_to_region_attention_backward";
  const DenseCall call = check_dense(op, query, key, value, region, scale, bias);
  check_grad_output(op, grad_output, query, call.output_shape());
  const Device device(query);
  return run_backward(op, problem_of(op, call), grad_output, query, key, value, bias, device.stream);
}

Tensor point_to_region_attention_packed(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const Tensor& grid_thw, std::vector<int64_t> region, OptionalScale scale,
                                        OptionalTensor bias) {
  constexpr auto op = "point_to_region_attention_packed";
  const PackedCall call = check_packed(op, query, key, value, grid_thw, region, scale, bias);
  const Device device(query);
  const PackedProblem problem(op, call, query, grid_thw, device.stream);
  return run_forward(op, problem.attention, call.output_shape(), query, key, value, bias, device.stream);
}

Gradients point_to_region_attention_packed_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                                    const Tensor& value, const Tensor& grid_thw,
                                                    std::vector<int64_t> region, OptionalScale scale,
                                                    OptionalTensor bias) {
  constexpr auto op = "point_to_region_attention_packed_backward";
  const PackedCall call = check_packed(op, query, key, value, grid_thw, region, scale, bias);
  check_grad_output(op, grad_output, query, call.output_shape());
  const Device device(query);
  const PackedProblem problem(op, call, query, grid_thw, device.stream);
  return run_backward(op, problem.attention, grad_output, query, key, value, bias, device.stream);
}

}  // namespace

LLAVA_ST_CUDA_KERNELS(m) {
  m.impl("point_to_region_attention", TORCH_BOX(&point_to_region_attention));
  m.impl("point_to_region_attention_backward", TORCH_BOX(&point_to_region_attention_backward));
  m.impl("point_to_region_attention_packed", TORCH_BOX(&point_to_region_attention_packed));
  m.impl("point_to_region_attention_packed_backward", TORCH_BOX(&point_to_region_attention_packed_backward));
}

}  // namespace llava_st
