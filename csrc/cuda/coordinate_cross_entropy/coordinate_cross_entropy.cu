// coordinate_cross_entropy and its gradient on CUDA.
#include "../../coordinate_loss.h"
#include "../element_types.h"
#include "../host.h"
#include "../matrix_products.h"
#include "loss.cuh"

namespace llava_st {
namespace {

/// How a loss is computed on CUDA: logits in float, from products in the dtype of hidden where the classes share it,
/// else in float. In the backward pass float16 is left out of that: gradients of logits would vanish in it.
class CudaLoss {
 public:
  CudaLoss(const char* op, const LossCall& call, bool backward, void* stream) : op_(op), stream_(stream) {
    with_element(op, {"hidden", call.hidden}, [](auto) {});  // or an error
    keeps_dtype_ = !backward || call.hidden.scalar_type() != ScalarType::Half;
  }

  const ScalarType wide = ScalarType::Float;
  const TileLimits limits = {int64_t{1} << 23, 4096};  // 32 MiB, and with 3,584 channels the rest is about as large

  Tensor operand(const Tensor& tensor, const Tensor& other) const {
    const bool keeps = keeps_dtype_ && tensor.scalar_type() == other.scalar_type();
    return torch::stable::contiguous(keeps ? tensor : torch::stable::to(tensor, ScalarType::Float));
  }
  void product(const Tensor& a, const Tensor& b, Tensor& out) const { cuda::multiply_to_float(a, b, out); }
  bool writes(const Tensor& result, const Tensor& operand) const {
    return result.scalar_type() == wide && operand.scalar_type() == wide;
  }

  void accumulate(Tensor& to, const Tensor& from) const {
    const int64_t count = to.numel();
    const int64_t blocks = smaller(ceil_div(count, 4 * cuda::kLossThreads), 4096);
    cuda::launch<cuda::accumulate>({blocks, cuda::kLossThreads, stream_}, cuda::updated_data<float>(to),
                                   cuda::input_data<float>(from), count);
    cuda::check_launches();
  }

  void find_targets(const LossCall& call, TargetTensors& targets) const { find(call, targets, {}); }

  void start(const LossCall& call, TargetTensors& targets, Tensor& largest, Tensor& sum, Tensor& target) const {
    find(call, targets,
         {cuda::result_data<float>(largest), cuda::result_data<float>(sum), cuda::result_data<float>(target)});
  }

  void update(const Tensor& z, int64_t first, int64_t token, TargetTensors& targets, Tensor& largest, Tensor& sum,
              Tensor& target) const {
    const cuda::LossStatistics statistics = {cuda::updated_data<float>(largest) + token,
                                             cuda::updated_data<float>(sum) + token,
                                             cuda::updated_data<float>(target) + token};
    const float* const logits = cuda::input_data<float>(z);
    const cuda::LaunchShape shape = {z.size(0), cuda::kLossThreads, stream_};
    const cuda::LossTargets found = view(targets, token);
    if (z.size(1) % 4 == 0) {
      cuda::launch<cuda::update_statistics<4>>(shape, logits, z.size(1), first, found, statistics);
    } else {
      cuda::launch<cuda::update_statistics<1>>(shape, logits, z.size(1), first, found, statistics);
    }
    cuda::check_launches();
  }

  void finish(TargetTensors& targets, Tensor& largest, Tensor& sum, Tensor& target, Tensor& losses,
              Tensor& logsumexp) const {
    const int64_t tokens = losses.size(0);
    const cuda::LossStatistics statistics = {cuda::updated_data<float>(largest), cuda::updated_data<float>(sum),
                                             cuda::updated_data<float>(target)};
    cuda::launch<cuda::finish_losses>({ceil_div(tokens, cuda::kLossThreads), cuda::kLossThreads, stream_}, tokens,
                                      view(targets, 0), statistics, cuda::result_data<float>(losses),
                                      cuda::result_data<float>(logsumexp));
    cuda::check_launches();
  }

  /// In the dtype of `operand`, float or bfloat16: float in place.
  Tensor logit_gradient(Tensor& z, int64_t first, int64_t token, TargetTensors& targets, const Tensor& logsumexp,
                        const Tensor& grad_losses, const Tensor& operand) const {
    float* const logits = cuda::updated_data<float>(z);
    const auto run = [&](auto* to) {
      using T = std::remove_pointer_t<decltype(to)>;
      const auto launch = z.size(1) % 4 == 0 ? &CudaLoss::launch_gradient<T, 4> : &CudaLoss::launch_gradient<T, 1>;
      (this->*launch)(logits, to, z, first, view(targets, token), logsumexp, grad_losses, token);
    };
    if (operand.scalar_type() == wide) {
      run(logits);
      return z;
    }
    Tensor gradient = allocate(op_, "gradients of logits", {z.size(0), z.size(1)}, operand);
    run(cuda::result_data<cuda::BFloat16>(gradient));
    return gradient;
  }

 private:
  static cuda::LossTargets view(TargetTensors& targets, int64_t token) {
    return {cuda::updated_data<int64_t>(targets.low) + token, cuda::updated_data<int64_t>(targets.high) + token,
            cuda::updated_data<double>(targets.ratio) + token};
  }

  void find(const LossCall& call, TargetTensors& targets, const cuda::LossStatistics& statistics) const {
    const Tensor labels = torch::stable::contiguous(torch::stable::to(call.labels, ScalarType::Long));
    const Tensor axes = torch::stable::contiguous(call.axis), places = torch::stable::contiguous(call.positions);
    const Tables& tables = call.tables;
    const cuda::LabelArguments arguments = {cuda::input_data<int64_t>(labels),
                                            cuda::input_data<int8_t>(axes),
                                            cuda::input_data<double>(places),
                                            call.tokens(),
                                            call.weight.size(0),
                                            call.ignore_index,
                                            tables.temporal.size(0),
                                            tables.height.size(0),
                                            tables.width.size(0)};
    const cuda::LossTargets found = {cuda::result_data<int64_t>(targets.low), cuda::result_data<int64_t>(targets.high),
                                     cuda::result_data<double>(targets.ratio)};
    cuda::launch<cuda::find_targets>({ceil_div(call.tokens(), cuda::kLossThreads), cuda::kLossThreads, stream_},
                                     arguments, found, statistics);
    cuda::check_launches();
  }

  template <class T, int ELEMENTS>
  void launch_gradient(const float* logits, T* to, const Tensor& z, int64_t first, const cuda::LossTargets& targets,
                       const Tensor& logsumexp, const Tensor& grad_losses, int64_t token) const {
    const int64_t parts = ceil_div(z.size(1), cuda::kLossThreads * cuda::kLogitsPerThread);
    cuda::launch<cuda::logit_gradient<T, ELEMENTS>>(
        {z.size(0) * parts, cuda::kLossThreads, stream_}, logits, to, z.size(1), parts, first, targets,
        cuda::input_data<float>(logsumexp) + token, cuda::input_data<float>(grad_losses) + token);
    cuda::check_launches();
  }

  const char* op_;
  void* stream_;
  bool keeps_dtype_;
};

std::tuple<Tensor, Tensor> coordinate_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& temporal,
                                                    const Tensor& height, const Tensor& width, const Tensor& labels,
                                                    const Tensor& axis, const Tensor& positions, int64_t ignore_index) {
  constexpr auto op = "coordinate_cross_entropy";
  const LossCall call = {hidden, weight, {temporal, height, width}, labels, axis, positions, ignore_index};
  check_loss(op, call);
  const cuda::Device device(hidden);
  CudaLoss loss(op, call, false, device.stream);
  return loss_forward(op, call, loss);
}

LossGradients coordinate_cross_entropy_backward(const Tensor& grad_losses, const Tensor& logsumexp,
                                                const Tensor& hidden, const Tensor& weight, const Tensor& temporal,
                                                const Tensor& height, const Tensor& width, const Tensor& labels,
                                                const Tensor& axis, const Tensor& positions, int64_t ignore_index,
                                                bool grad_hidden, bool grad_weight, bool grad_tables) {
  constexpr auto op = "coordinate_cross_entropy_backward";
  const LossCall call = {hidden, weight, {temporal, height, width}, labels, axis, positions, ignore_index};
  check_loss(op, call);
  const cuda::Device device(hidden);
  CudaLoss loss(op, call, true, device.stream);
  check_vector(op, {"grad_losses", grad_losses}, call.tokens(), {loss.wide}, {"hidden", hidden});
  check_vector(op, {"logsumexp", logsumexp}, call.tokens(), {loss.wide}, {"hidden", hidden});
  return loss_backward(op, call, torch::stable::contiguous(grad_losses), torch::stable::contiguous(logsumexp),
                       grad_hidden, grad_weight, grad_tables, loss);
}

}  // namespace

LLAVA_ST_CUDA_KERNELS(m) {
  m.impl("coordinate_cross_entropy", TORCH_BOX(&coordinate_cross_entropy));
  m.impl("coordinate_cross_entropy_backward", TORCH_BOX(&coordinate_cross_entropy_backward));
}

}  // namespace llava_st
