// point_to_region_attention and its kin on CUDA: checked tensors in, launches on the current stream, tensors out.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "../../attention_call.h"
#include "dispatch.h"

namespace llava_st {

namespace cuda {

// Instantiated in a file each.
extern template void launch_forward(const ForwardArguments<float>&, void*, int64_t);
extern template void launch_forward(const ForwardArguments<Float16>&, void*, int64_t);
extern template void launch_forward(const ForwardArguments<BFloat16>&, void*, int64_t);
extern template void launch_backward(const BackwardArguments<float>&, void*, int64_t);
extern template void launch_backward(const BackwardArguments<Float16>&, void*, int64_t);
extern template void launch_backward(const BackwardArguments<BFloat16>&, void*, int64_t);

}  // namespace cuda

namespace {

using cuda::AttentionProblem;
using torch::stable::accelerator::DeviceGuard;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

/// Calls `visit` with an element of the tensor's dtype.
template <class Visit>
void with_element(const char* op, const Tensor& query, const Visit& visit) {
  switch (query.scalar_type()) {
    case ScalarType::Float:
      return visit(float{});
    case ScalarType::BFloat16:
      return visit(cuda::BFloat16{});
    case ScalarType::Half:
      return visit(cuda::Float16{});
    default:
      fail(op, ": query must be float32, bfloat16 or float16 on a CUDA device, got ", to_text(query.scalar_type()));
  }
}

/// The kernels' view of a tensor, dense or packed. They only write to results.
template <class T>
cuda::Operand<T> operand(const Tensor& tensor) {
  T* const data = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
  return {data, cuda::strides_that_count(tensor.sizes().data(), tensor.strides().data(), tensor.dim() == 3)};
}

template <class T>
T* data_of(Tensor& result) {
  return static_cast<T*>(result.mutable_data_ptr());
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
  return cuda::dense_problem(call.batch, call.grid, call.region, call.heads, call.head_dim, call.scale);
}

/// A packed problem and the device memory for where its videos begin.
struct PackedProblem {
  Tensor scratch;
  AttentionProblem attention;

  AttentionProblem attention_in_scratch(const char* op, const PackedCall& call, Extent longest) {
    check_places(op, cuda::clip(call.region, longest));
    return cuda::packed_problem(call.queries, call.keys, call.videos, longest, call.region, call.heads, call.head_dim,
                                call.scale, data_of<int64_t>(scratch));
  }

  PackedProblem(const char* op, const PackedCall& call, const Tensor& query, const Tensor& grid_thw, void* stream)
      : scratch(allocate(op, "the offsets of grid_thw", {cuda::packed_scratch_size(call.videos)}, query,
                         ScalarType::Long)) {
    if (grid_thw.is_cpu()) {
      upload(op, call, read_grids(op, grid_thw, call), stream);
      return;
    }
    attention = attention_in_scratch(op, call, {call.keys, call.keys, call.keys});
    const Tensor grids = torch::stable::contiguous(grid_thw);
    if (grids.scalar_type() == ScalarType::Long) {
      cuda::locate(attention, static_cast<const int64_t*>(grids.const_data_ptr()), stream);
    } else {
      cuda::locate(attention, static_cast<const int32_t*>(grids.const_data_ptr()), stream);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  /// Copies from pageable memory, which is free to change as soon as the call returns. Not so in a graph, which would
  /// read it again in every replay.
  void upload(const char* op, const PackedCall& call, const PackedGrids& packed, void* stream) {
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    STD_CUDA_CHECK(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capturing));
    LLAVA_ST_CHECK(capturing == cudaStreamCaptureStatusNone, op,
                   ": grid_thw must be on the device of query while a CUDA graph is captured, got cpu");
    Extent longest = {0, 0, 0};
    for (const Extent& grid : packed.grids) {
      longest = {std::max(longest.t, grid.t), std::max(longest.h, grid.h), std::max(longest.w, grid.w)};
    }
    attention = attention_in_scratch(op, call, longest);
    const auto copy = [&](const auto* to, const auto& from) {
      STD_CUDA_CHECK(cudaMemcpyAsync(const_cast<void*>(static_cast<const void*>(to)), from.data(),
                                     from.size() * sizeof(from[0]), cudaMemcpyHostToDevice,
                                     static_cast<cudaStream_t>(stream)));
    };
    copy(attention.offsets, packed.offsets);
    copy(attention.grids, packed.grids);
  }
};

Tensor run_forward(const char* op, const AttentionProblem& problem, const std::vector<int64_t>& query_shape,
                   const Tensor& query, const Tensor& key, const Tensor& value, void* stream) {
  Tensor output = allocate(op, "the output", query_shape, query);
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value);
  with_element(op, query, [&](auto element) {
    using T = decltype(element);
    const cuda::ForwardArguments<T> arguments = {problem, operand<const T>(q), operand<const T>(k), operand<const T>(v),
                                                 data_of<T>(output)};
    cuda::launch_forward(arguments, stream, cuda::kMaxBlocks);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

void check_grad_output(const char* op, const Tensor& grad_output, const Tensor& query,
                       const std::vector<int64_t>& query_shape) {
  check_same_kind(op, {"grad_output", grad_output}, {"query", query});
  check_shape(op, {"grad_output", grad_output}, query_shape);
}

Gradients run_backward(const char* op, const AttentionProblem& problem, const Tensor& grad_output, const Tensor& query,
                       const Tensor& key, const Tensor& value, void* stream) {
  Tensor grad_query = allocate_gradient(op, "the gradient of query", query);
  Tensor grad_key = allocate_gradient(op, "the gradient of key", key);
  Tensor grad_value = allocate_gradient(op, "the gradient of value", value);
  const Tensor g = with_contiguous_rows(grad_output);
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value);
  with_element(op, query, [&](auto element) {
    using T = decltype(element);
    const cuda::BackwardArguments<T> arguments = {
        problem,
        operand<const T>(g),
        operand<const T>(q),
        operand<const T>(k),
        operand<const T>(v),
        data_of<T>(grad_query),
        operand<T>(grad_key),
        operand<T>(grad_value),
    };
    cuda::launch_backward(arguments, stream, cuda::kMaxBlocks);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_query, grad_key, grad_value};
}

Tensor point_to_region_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                 std::vector<int64_t> region, OptionalScale scale) {
  constexpr auto op = "point_to_region_attention";
  const DenseCall call = check_dense(op, query, key, value, region, scale);
  const DeviceGuard guard(query.get_device_index());
  return run_forward(op, problem_of(op, call), call.query_shape(), query, key, value, current_stream(query));
}

Gradients point_to_region_attention_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                             const Tensor& value, std::vector<int64_t> region, OptionalScale scale) {
  constexpr auto op = "point_to_region_attention_backward";
  const DenseCall call = check_dense(op, query, key, value, region, scale);
  check_grad_output(op, grad_output, query, call.query_shape());
  const DeviceGuard guard(query.get_device_index());
  return run_backward(op, problem_of(op, call), grad_output, query, key, value, current_stream(query));
}

Tensor point_to_region_attention_packed(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const Tensor& grid_thw, std::vector<int64_t> region, OptionalScale scale) {
  constexpr auto op = "point_to_region_attention_packed";
  const PackedCall call = check_packed(op, query, key, value, grid_thw, region, scale);
  const DeviceGuard guard(query.get_device_index());
  void* const stream = current_stream(query);
  const PackedProblem problem(op, call, query, grid_thw, stream);
  return run_forward(op, problem.attention, call.query_shape(), query, key, value, stream);
}

Gradients point_to_region_attention_packed_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                                    const Tensor& value, const Tensor& grid_thw,
                                                    std::vector<int64_t> region, OptionalScale scale) {
  constexpr auto op = "point_to_region_attention_packed_backward";
  const PackedCall call = check_packed(op, query, key, value, grid_thw, region, scale);
  check_grad_output(op, grad_output, query, call.query_shape());
  const DeviceGuard guard(query.get_device_index());
  void* const stream = current_stream(query);
  const PackedProblem problem(op, call, query, grid_thw, stream);
  return run_backward(op, problem.attention, grad_output, query, key, value, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llava_st, CUDA, m) {
  m.impl("point_to_region_attention", TORCH_BOX(&point_to_region_attention));
  m.impl("point_to_region_attention_backward", TORCH_BOX(&point_to_region_attention_backward));
  m.impl("point_to_region_attention_packed", TORCH_BOX(&point_to_region_attention_packed));
  m.impl("point_to_region_attention_packed_backward", TORCH_BOX(&point_to_region_attention_packed_backward));
}

}  // namespace llava_st
