// linear_lape_gelu and gelu_linear_gradient on the CPU: a matrix product by torch and a kernel behind it.
#include <torch/csrc/stable/library.h>

#include "../lape_mlp_call.h"
#include "host.h"
#include "instruction_set.h"

namespace llava_st {
namespace {

std::tuple<Tensor, Tensor> linear_lape_gelu(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                            const Tensor& temporal, const Tensor& height, const Tensor& width,
                                            bool keep_preactivation) {
  constexpr auto op = "linear_lape_gelu";
  const LinearCall call = check_linear(op, features, weight, bias, temporal, height, width);
  const auto kernel = cpu::position_kernels().position_gelu[cpu::element_of(op, {"features", features})];
  Tensor activation = cpu::allocate_result(op, "the activation", call.shape(), features);
  const std::vector<int64_t> kept = keep_preactivation ? call.shape() : std::vector<int64_t>{0};
  Tensor preactivation = cpu::allocate_result(op, "the preactivation", kept, features);
  if (activation.numel() == 0) return {activation, preactivation};

  Tensor product = torch::stable::view(activation, {call.rows(), call.channels()});
  multiply(call.features, transposed(weight), product);
  const ScalarType wide = cpu::computing_dtype(features);
  const Tensor b = cpu::contiguous_in(bias, wide), t = cpu::contiguous_in(temporal, wide),
               h = cpu::contiguous_in(height, wide), w = cpu::contiguous_in(width, wide);
  const cpu::PositionGelu positions = {activation.const_data_ptr(),
                                       keep_preactivation ? preactivation.mutable_data_ptr() : nullptr,
                                       activation.mutable_data_ptr(),
                                       b.const_data_ptr(),
                                       t.const_data_ptr(),
                                       h.const_data_ptr(),
                                       w.const_data_ptr(),
                                       call.samples,
                                       call.grid,
                                       call.channels()};
  const bool done = kernel(positions, cpu::torch_loop());
  LLAVA_ST_CHECK(done, op, ": out of memory allocating scratch memory for ", call.channels(), " channels on cpu");
  return {activation, preactivation};
}

std::tuple<Tensor, Tensor> gelu_linear_gradient(const Tensor& grad_output, const Tensor& weight,
                                                const Tensor& preactivation) {
  constexpr auto op = "gelu_linear_gradient";
  check_gelu_gradient(op, grad_output, weight, preactivation);
  const auto kernel = cpu::position_kernels().gelu_gradient[cpu::element_of(op, {"preactivation", preactivation})];
  const std::vector<int64_t> shape = {preactivation.size(0), preactivation.size(1)};
  Tensor gradient = cpu::allocate_result(op, "the gradient of the preactivation", shape, preactivation);
  Tensor activation = cpu::allocate_result(op, "the activation", shape, preactivation);
  if (gradient.numel() == 0) return {gradient, activation};
  multiply(grad_output, weight, gradient);
  const Tensor before = with_contiguous_rows(preactivation);
  kernel({gradient.mutable_data_ptr(), activation.mutable_data_ptr(), before.const_data_ptr(), before.size(0),
          before.size(1), before.stride(0)},
         cpu::torch_loop());
  return {gradient, activation};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llava_st, CPU, m) {
  m.impl("linear_lape_gelu", TORCH_BOX(&linear_lape_gelu));
  m.impl("gelu_linear_gradient", TORCH_BOX(&gelu_linear_gradient));
}

}  // namespace llava_st
