// normalized_region_attention on CUDA: checked tensors in, launches on the current stream, tensors out.
#include "../../normalized_attention_call.h"
#include "../element_types.h"
#include "dispatch.h"

namespace llava_st {

namespace cuda {

// Instantiated in a file each.
extern template void launch_normalized_forward(const NormalizedForwardArguments<float>&, void*);
extern template void launch_normalized_forward(const NormalizedForwardArguments<Float16>&, void*);
extern template void launch_normalized_forward(const NormalizedForwardArguments<BFloat16>&, void*);
extern template void launch_normalized_backward(const NormalizedBackwardArguments<float>&, int64_t, void*);
extern template void launch_normalized_backward(const NormalizedBackwardArguments<Float16>&, int64_t, void*);
extern template void launch_normalized_backward(const NormalizedBackwardArguments<BFloat16>&, int64_t, void*);

}  // namespace cuda

namespace {

using cuda::Device;
using cuda::NormalizedProblem;

/// Strides of a `[B, T, H, W, ...]` tensor with or without heads; those of dimensions with at most one entry do not
/// count.
TokenStrides strides_of_grid(const Tensor& tensor) {
  const auto stride = [&](int dim) { return tensor.size(dim) > 1 ? tensor.stride(dim) : 0; };
  return {stride(0), stride(1), stride(2), stride(3), tensor.dim() == 6 ? stride(4) : 0};
}

template <class T>
cuda::Operand<const T> input_of(const Tensor& tensor) {
  return {cuda::input_data<T>(tensor), strides_of_grid(tensor)};
}
template <class T>
cuda::Operand<T> result_of(Tensor& tensor) {
  return {cuda::result_data<T>(tensor), strides_of_grid(tensor)};
}

Tensor allocate_gradient_of(const char* op, const char* name, const Tensor& of) {
  return allocate(op, name, {of.sizes().begin(), of.sizes().end()}, of);
}

NormalizedProblem problem_of(const char* op, const NormalizedCall& call) {
  const Extent region = cuda::clip(call.region, call.grid);
  LLAVA_ST_CHECK(cuda::fits_places(region), op,
                 ": regions of 2^31 tokens or more along one axis are not supported, got ",
                 to_text(std::vector<int64_t>{region.t, region.h, region.w}));
  LLAVA_ST_CHECK(call.width < cuda::kMostChannels, op, ": 2^30 channels or more are not supported, got ", call.width);
  return cuda::normalized_problem(call.batch, call.grid, call.region, call.heads, call.width, call.eps);
}

Tensor normalized_region_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                   std::vector<int64_t> region, double eps) {
  constexpr auto op = "normalized_region_attention";
  const NormalizedCall call = check_normalized(op, query, key, value, region, eps);
  const NormalizedProblem problem = problem_of(op, call);
  const Device device(query);
  Tensor output = allocate(op, "the output", call.query_shape(), query);
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value);
  with_element(op, {"query", query}, [&](auto element) {
    using T = decltype(element);
    const cuda::NormalizedForwardArguments<T> arguments = {problem, input_of<T>(q), input_of<T>(k), input_of<T>(v),
                                                           cuda::result_data<T>(output)};
    cuda::launch_normalized_forward(arguments, device.stream);
  });
  cuda::check_launches();
  return output;
}

std::tuple<Tensor, Tensor, Tensor> normalized_region_attention_backward(const Tensor& grad_output, const Tensor& query,
                                                                        const Tensor& key, const Tensor& value,
                                                                        std::vector<int64_t> region, double eps) {
  constexpr auto op = "normalized_region_attention_backward";
  const NormalizedCall call = check_normalized(op, query, key, value, region, eps);
  check_normalized_gradient(op, grad_output, query, call);
  const NormalizedProblem problem = problem_of(op, call);
  const Device device(query);
  Tensor grad_query = allocate_gradient_of(op, "the gradient of query", query);
  Tensor grad_key = allocate_gradient_of(op, "the gradient of key", key);
  Tensor grad_value = allocate_gradient_of(op, "the gradient of value", value);
  constexpr int64_t numbers = sizeof(cuda::QueryStatistics) / sizeof(float);
  Tensor scratch = allocate(op, "scratch memory", {cuda::rows_of(problem), numbers}, query, ScalarType::Float);
  const Tensor g = with_contiguous_rows(grad_output);
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value);
  with_element(op, {"query", query}, [&](auto element) {
    using T = decltype(element);
    const cuda::NormalizedBackwardArguments<T> arguments = {
        problem,
        input_of<T>(g),
        input_of<T>(q),
        input_of<T>(k),
        input_of<T>(v),
        cuda::result_data<T>(grad_query),
        result_of<T>(grad_key),
        result_of<T>(grad_value),
        cuda::result_data<cuda::QueryStatistics>(scratch),
    };
    cuda::launch_normalized_backward(arguments, call.batch * call.grid.count(), device.stream);
  });
  cuda::check_launches();
  return {grad_query, grad_key, grad_value};
}

}  // namespace

LLAVA_ST_CUDA_KERNELS(m) {
  m.impl("normalized_region_attention", TORCH_BOX(&normalized_region_attention));
  m.impl("normalized_region_attention_backward", TORCH_BOX(&normalized_region_attention_backward));
}

}  // namespace llava_st
