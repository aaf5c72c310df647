// lape_scatter and its backward op on CUDA: checked tensors in, launches on the current stream, tensors out.
#include "../../lape_call.h"
#include "../element_types.h"
#include "dispatch.h"

namespace llava_st {

namespace cuda {

// Instantiated in a file each.
#define LLAVA_ST_INSTANTIATED(T)                                               \
  extern template void launch_lape_scatter(const ScatterArguments<T>&, void*); \
  extern template void launch_lape_scatter_backward(const GatherArguments<T>&, void*);
LLAVA_ST_INSTANTIATED(float)
LLAVA_ST_INSTANTIATED(Float16)
LLAVA_ST_INSTANTIATED(BFloat16)
#undef LLAVA_ST_INSTANTIATED

}  // namespace cuda

namespace {

using cuda::Device;

/// That of what has at most one row does not count.
int64_t stride_of(const Tensor& tensor) { return tensor.size(0) > 1 ? tensor.stride(0) : 0; }

template <class T>
cuda::Rows<const T> input_rows(const Tensor& tensor) {
  return {cuda::input_data<T>(tensor), tensor.size(0), stride_of(tensor)};
}
template <class T>
cuda::Rows<T> result_rows(Tensor& tensor) {
  return {cuda::result_data<T>(tensor), tensor.size(0), stride_of(tensor)};
}

template <class T>
constexpr cuda::Kind kKind = std::is_same_v<T, float>            ? cuda::Kind::kFloat
                             : std::is_same_v<T, cuda::BFloat16> ? cuda::Kind::kBFloat16
                                                                 : cuda::Kind::kFloat16;

cuda::RowsOfKind<const void> input_table(const char* op, Argument table) {
  cuda::RowsOfKind<const void> result = {};
  with_element(op, table, [&](auto element) {
    using T = decltype(element);
    const cuda::Rows<const T> rows = input_rows<T>(table.tensor);
    result = {rows.data, rows.count, rows.stride, kKind<T>, cuda::in_vectors(rows)};
  });
  return result;
}

cuda::RowsOfKind<void> result_table(const char* op, const char* name, Tensor& gradient) {
  cuda::RowsOfKind<void> result = {};
  with_element(op, {name, gradient}, [&](auto element) {
    using T = decltype(element);
    const cuda::Rows<T> rows = result_rows<T>(gradient);
    result = {rows.data, rows.count, rows.stride, kKind<T>, cuda::in_vectors(rows)};
  });
  return result;
}

cuda::Integers integers(const Tensor& tensor) {
  const bool wide = tensor.scalar_type() == ScalarType::Long;
  const void* const data = wide ? static_cast<const void*>(cuda::input_data<int64_t>(tensor))
                                : static_cast<const void*>(cuda::input_data<int32_t>(tensor));
  return {data, stride_of(tensor), wide};
}

/// The dtypes that there are kernels for.
void check_kinds(const char* op, const Tensor& embed, const Tables& tables) {
  with_element(op, {"embed", embed}, [](auto) {});
  with_element(op, {"temporal", tables.temporal}, [](auto) {});
}

Tensor lape_scatter(const Tensor& embed, const Tensor& temporal, const Tensor& height, const Tensor& width,
                    const Tensor& input_ids, const Tensor& axis, const Tensor& positions, const Tensor& visual_index,
                    const Tensor& visual) {
  constexpr auto op = "lape_scatter";
  const Tables tables = {temporal, height, width};
  check_lape_scatter(op, embed, tables, input_ids, axis, positions, visual_index, visual);
  check_kinds(op, embed, tables);
  const Device device(embed);
  const int64_t tokens = input_ids.size(0), channels = embed.size(1);
  Tensor output = allocate(op, "the embeddings", {tokens, channels}, embed);
  const Tensor e = with_contiguous_rows(embed), v = with_contiguous_rows(visual);
  const Tensor t = with_contiguous_rows(temporal), h = with_contiguous_rows(height), w = with_contiguous_rows(width);
  with_element(op, {"embed", embed}, [&](auto element) {
    using T = decltype(element);
    const cuda::ScatterArguments<T> arguments = {
        input_rows<T>(e),
        input_rows<T>(v),
        input_table(op, {"temporal", t}),
        input_table(op, {"height", h}),
        input_table(op, {"width", w}),
        integers(input_ids),
        integers(visual_index),
        cuda::input_data<int8_t>(axis),
        cuda::input_data<double>(positions),
        stride_of(axis),
        stride_of(positions),
        cuda::result_data<T>(output),
        tokens,
        channels,
    };
    cuda::launch_lape_scatter(arguments, device.stream);
  });
  cuda::check_launches();
  return output;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients lape_scatter_backward(const Tensor& grad_output, const Tensor& destination, const Tensor& token,
                                const Tensor& share, const Tensor& embed, const Tensor& temporal, const Tensor& height,
                                const Tensor& width, const Tensor& visual) {
  constexpr auto op = "lape_scatter_backward";
  const Tables tables = {temporal, height, width};
  check_lape_scatter_backward(op, grad_output, destination, token, share, embed, tables, visual);
  check_kinds(op, embed, tables);
  const Device device(embed);
  const auto allocate_gradient = [&](const char* name, const Tensor& of) {
    return allocate(op, name, {of.size(0), of.size(1)}, of);
  };
  Tensor grad_embed = allocate_gradient("the gradient of embed", embed);
  Tensor grad_temporal = allocate_gradient("the gradient of temporal", temporal);
  Tensor grad_height = allocate_gradient("the gradient of height", height);
  Tensor grad_width = allocate_gradient("the gradient of width", width);
  Tensor grad_visual = allocate_gradient("the gradient of visual", visual);
  const Tensor gradient = with_contiguous_rows(grad_output);
  const Tensor d = torch::stable::contiguous(destination), t = torch::stable::contiguous(token);
  const Tensor s = torch::stable::contiguous(share);
  const int64_t entries = destination.size(0), channels = embed.size(1);
  Tensor segments =
      allocate(op, "scratch memory for sums", {entries / cuda::kSegment, channels}, embed, ScalarType::Float);
  with_element(op, {"embed", embed}, [&](auto element) {
    using T = decltype(element);
    const cuda::GatherArguments<T> arguments = {
        input_rows<T>(gradient),
        cuda::input_data<int64_t>(d),
        cuda::input_data<int64_t>(t),
        cuda::input_data<double>(s),
        entries,
        cuda::result_data<float>(segments),
        result_rows<T>(grad_embed),
        result_rows<T>(grad_visual),
        result_table(op, "temporal", grad_temporal),
        result_table(op, "height", grad_height),
        result_table(op, "width", grad_width),
        channels,
    };
    cuda::launch_lape_scatter_backward(arguments, device.stream);
  });
  cuda::check_launches();
  return {grad_embed, grad_temporal, grad_height, grad_width, grad_visual};
}

}  // namespace

LLAVA_ST_CUDA_KERNELS(m) {
  m.impl("lape_scatter", TORCH_BOX(&lape_scatter));
  m.impl("lape_scatter_backward", TORCH_BOX(&lape_scatter_backward));
}

}  // namespace llava_st
