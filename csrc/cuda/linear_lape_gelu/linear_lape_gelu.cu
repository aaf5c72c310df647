// linear_lape_gelu and gelu_linear_gradient on CUDA: a matrix product by torch (cuBLAS) and a kernel behind it, or
// where that was chosen, all in one product by CUTLASS.
#include <algorithm>

#include "../element_types.h"
#include "backward.cuh"
#include "cutlass/fused.h"
#include "forward.cuh"
#include "tables.h"

namespace llava_st {
namespace {

/// So many blocks keep the memory of a large GPU busy; beyond them, a thread rather does more.
constexpr int64_t kBlocksWanted = 1024;

template <class T>
constexpr int kVector = sizeof(cuda::Words) / sizeof(T);

cuda::LaunchShape shape_for(int64_t threads, int threads_per_block, void* stream) {
  return {smaller(ceil_div(threads, threads_per_block), cuda::max_blocks()), threads_per_block, stream};
}

// Forward -------------------------------------------------------------------------------------------------------------

/// `arguments` lack what depends on the layout.
template <class L>
void launch_position_gelu(cuda::PositionGeluArguments<typename L::Element> arguments, void* stream) {
  const int64_t packets = arguments.channels / L::ELEMENTS, columns = arguments.columns;
  const int64_t threads = smaller(kBlocksWanted, cuda::max_blocks()) * cuda::kGeluThreads;
  const int64_t most = std::max<int64_t>(columns, cuda::kPatchesInFlight);
  const int64_t run = std::clamp<int64_t>(arguments.lines * columns * packets / threads, cuda::kPatchesInFlight, most);
  const int64_t runs = ceil_div(columns, run);
  arguments.run = ceil_div(columns, runs);  // as alike as can be
  arguments.by_packets = cuda::Divisor(packets);
  arguments.by_runs = cuda::Divisor(runs);
  cuda::launch<cuda::position_gelu<L>>(shape_for(arguments.lines * runs * packets, cuda::kGeluThreads, stream),
                                       arguments);
}

/// Adds bias and positions to the product, which lies where `preactivation` is to be, or `activation` if null.
void finish_forward(const char* op, const LinearCall& call, const FloatPositions& positions, Tensor* preactivation,
                    Tensor& activation, void* stream) {
  with_element(op, {"features", call.features}, [&](auto element) {
    using T = decltype(element);
    cuda::PositionGeluArguments<T> arguments = {};
    T* const product = cuda::updated_data<T>(preactivation ? *preactivation : activation);
    arguments.product = product;
    arguments.preactivation = preactivation ? product : nullptr;
    arguments.activation = preactivation ? cuda::result_data<T>(activation) : product;
    arguments.bias = cuda::input_data<float>(positions.bias);
    arguments.temporal = cuda::input_data<float>(positions.temporal);
    arguments.height = cuda::input_data<float>(positions.height);
    arguments.width = cuda::input_data<float>(positions.width);
    arguments.channels = call.channels();
    arguments.columns = call.grid.w;
    arguments.lines = call.samples * call.grid.t * call.grid.h;
    arguments.by_rows = cuda::Divisor(call.grid.h);
    arguments.by_frames = cuda::Divisor(call.grid.t);
    if (call.channels() % kVector<T> == 0) {  // results are aligned
      launch_position_gelu<cuda::Packets<T, kVector<T>>>(arguments, stream);
    } else {
      launch_position_gelu<cuda::Packets<T, 1>>(arguments, stream);
    }
  });
  cuda::check_launches();
}

std::tuple<Tensor, Tensor> linear_lape_gelu(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                            const Tensor& temporal, const Tensor& height, const Tensor& width,
                                            bool keep_preactivation) {
  constexpr auto op = "linear_lape_gelu";
  const LinearCall call = check_linear(op, features, weight, bias, temporal, height, width);
  with_element(op, {"features", features}, [](auto) {});  // or an error
  const cuda::Device device(features);
  Tensor activation = allocate(op, "the activation", call.shape(), features);
  Tensor preactivation =
      allocate(op, "the preactivation", keep_preactivation ? call.shape() : std::vector<int64_t>{0}, features);
  if (activation.numel() == 0) return {activation, preactivation};
  Tensor* const kept = keep_preactivation ? &preactivation : nullptr;
  const FloatPositions positions(call);
  if (!fused_forward(op, call, positions, kept, activation, device.stream)) {
    Tensor product = torch::stable::view(kept ? preactivation : activation, {call.rows(), call.channels()});
    multiply(call.features, transposed(weight), product);
    finish_forward(op, call, positions, kept, activation, device.stream);
  }
  return {activation, preactivation};
}

// Backward ------------------------------------------------------------------------------------------------------------

template <class L>
void launch_gelu_gradient(cuda::GeluGradientArguments<typename L::Element> arguments, void* stream) {
  const int64_t packets = arguments.channels / L::ELEMENTS;
  arguments.by_packets = cuda::Divisor(packets);
  const int64_t threads = ceil_div(arguments.tokens, cuda::kTokensPerThread) * packets;
  cuda::launch<cuda::gelu_gradient<L>>(shape_for(threads, cuda::kGradientThreads, stream), arguments);
}

void finish_gradient(const char* op, const Tensor& preactivation, Tensor& gradient, Tensor& activation, void* stream) {
  const Tensor rows = with_contiguous_rows(preactivation);
  with_element(op, {"preactivation", rows}, [&](auto element) {
    using T = decltype(element);
    cuda::GeluGradientArguments<T> arguments = {};
    arguments.gradient = cuda::updated_data<T>(gradient);
    arguments.activation = cuda::result_data<T>(activation);
    arguments.preactivation = cuda::input_data<T>(rows);
    arguments.tokens = rows.size(0);
    arguments.channels = rows.size(1);
    arguments.stride = arguments.tokens > 1 ? rows.stride(0) : 0;
    const bool whole = arguments.channels % kVector<T> == 0 && arguments.stride % kVector<T> == 0;
    if (whole && cuda::aligned(arguments.preactivation, kVector<T>)) {
      launch_gelu_gradient<cuda::Packets<T, kVector<T>>>(arguments, stream);
    } else {
      launch_gelu_gradient<cuda::Packets<T, 1>>(arguments, stream);
    }
  });
  cuda::check_launches();
}

std::tuple<Tensor, Tensor> gelu_linear_gradient(const Tensor& grad_output, const Tensor& weight,
                                                const Tensor& preactivation) {
  constexpr auto op = "gelu_linear_gradient";
  check_gelu_gradient(op, grad_output, weight, preactivation);
  with_element(op, {"preactivation", preactivation}, [](auto) {});  // or an error
  const cuda::Device device(preactivation);
  const std::vector<int64_t> shape = {preactivation.size(0), preactivation.size(1)};
  Tensor gradient = allocate(op, "the gradient of the preactivation", shape, preactivation);
  Tensor activation = allocate(op, "the activation", shape, preactivation);
  if (gradient.numel() == 0) return {gradient, activation};
  if (!fused_backward(op, grad_output, weight, preactivation, gradient, activation, device.stream)) {
    multiply(grad_output, weight, gradient);
    finish_gradient(op, preactivation, gradient, activation, device.stream);
  }
  return {gradient, activation};
}

}  // namespace

LLAVA_ST_CUDA_KERNELS(m) {
  m.impl("linear_lape_gelu", TORCH_BOX(&linear_lape_gelu));
  m.impl("gelu_linear_gradient", TORCH_BOX(&gelu_linear_gradient));
}

}  // namespace llava_st
