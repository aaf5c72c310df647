// coordinate_cross_entropy and its gradient on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../coordinate_loss.h"
#include "host.h"
#include "instruction_set.h"

namespace llava_st {
namespace {

/// How a loss is computed on the CPU: all products in float, or in double for double.
class CpuLoss {
 public:
  explicit CpuLoss(const char* op, const Tensor& hidden)
      : wide(cpu::computing_dtype(hidden)), op_(op), double_(wide == ScalarType::Double) {
    cpu::element_of(op, {"hidden", hidden});  // or an error
  }

  const ScalarType wide;
  const TileLimits limits = {int64_t{1} << 23, int64_t{1} << 23};  // 32 MiB of float

  Tensor operand(const Tensor& tensor, const Tensor&) const { return cpu::contiguous_in(tensor, wide); }
  void product(const Tensor& a, const Tensor& b, Tensor& out) const { multiply(a, b, out); }
  bool writes(const Tensor& result, const Tensor&) const { return result.scalar_type() == wide; }

  void accumulate(Tensor& to, const Tensor& from) const {
    kernels_.accumulate[double_](to.mutable_data_ptr(), from.const_data_ptr(), to.numel(), cpu::torch_loop());
  }

  /// Also checks what counts of each token.
  void find_targets(const LossCall& call, TargetTensors& targets) const {
    const Tensor labels = cpu::contiguous_in(call.labels, ScalarType::Long);
    const Tensor axes = torch::stable::contiguous(call.axis), places = torch::stable::contiguous(call.positions);
    const auto* const label = static_cast<const int64_t*>(labels.const_data_ptr());
    const auto* const axis = static_cast<const int8_t*>(axes.const_data_ptr());
    const auto* const position = static_cast<const double*>(places.const_data_ptr());
    auto* const low = static_cast<int64_t*>(targets.low.mutable_data_ptr());
    auto* const high = static_cast<int64_t*>(targets.high.mutable_data_ptr());
    auto* const ratio = static_cast<double*>(targets.ratio.mutable_data_ptr());
    const int64_t words = call.weight.size(0), classes = call.classes();
    const int64_t counts[] = {call.tables.temporal.size(0), call.tables.height.size(0), call.tables.width.size(0)};
    const int64_t begins[] = {words, words + counts[0], words + counts[0] + counts[1]};
    for (int64_t i = 0; i < call.tokens(); ++i) {
      low[i] = high[i] = -1;
      ratio[i] = 0;
      if (label[i] == call.ignore_index) continue;
      LLAVA_ST_CHECK(axis[i] >= -1 && axis[i] < 3, op_, ": axis[", i, "] must be -1, 0, 1 or 2, got ", int{axis[i]});
      if (axis[i] >= 0) {
        LLAVA_ST_CHECK(!std::isnan(position[i]), op_, ": positions[", i,
                       "] must be a number where axis names a table, got nan");
        const Between<double> between = coordinate_between(position[i], counts[axis[i]]);
        low[i] = begins[axis[i]] + between.low;
        high[i] = begins[axis[i]] + between.high;
        ratio[i] = between.ratio;
      } else {
        LLAVA_ST_CHECK(label[i] >= 0 && label[i] < classes, op_, ": labels[", i, "] must be ", call.ignore_index,
                       " or in [0, ", classes, "), got ", label[i]);
        low[i] = high[i] = label[i];
      }
    }
  }

  void start(const LossCall& call, TargetTensors& targets, Tensor& largest, Tensor& sum, Tensor& target) const {
    find_targets(call, targets);
    torch::stable::fill_(largest, -INFINITY);
    torch::stable::zero_(sum);
    torch::stable::zero_(target);
  }

  void update(const Tensor& z, int64_t first, int64_t token, const TargetTensors& targets, Tensor& largest, Tensor& sum,
              Tensor& target) const {
    const cpu::Statistics statistics = {entry(largest, token), entry(sum, token), entry(target, token)};
    kernels_.update_statistics[double_](logits(z, first), view(targets, token), statistics, cpu::torch_loop());
  }

  void finish(const TargetTensors& targets, const Tensor& largest, const Tensor& sum, const Tensor& target,
              Tensor& losses, Tensor& logsumexp) const {
    if (double_) {
      finish_as<double>(targets, largest, sum, target, losses, logsumexp);
    } else {
      finish_as<float>(targets, largest, sum, target, losses, logsumexp);
    }
  }

  /// In place.
  Tensor logit_gradient(const Tensor& z, int64_t first, int64_t token, const TargetTensors& targets,
                        const Tensor& logsumexp, const Tensor& grad_losses, const Tensor&) const {
    kernels_.logit_gradient[double_](logits(z, first), view(targets, token), entry(logsumexp, token),
                                     entry(grad_losses, token), cpu::torch_loop());
    return z;
  }

 private:
  static void* entry(const Tensor& vector, int64_t at) {
    return static_cast<char*>(const_cast<void*>(vector.const_data_ptr())) + at * vector.element_size();
  }
  static cpu::Logits logits(const Tensor& z, int64_t first) { return {entry(z, 0), z.size(0), z.size(1), first}; }
  static cpu::Targets view(const TargetTensors& targets, int64_t token) {
    return {static_cast<const int64_t*>(entry(targets.low, token)),
            static_cast<const int64_t*>(entry(targets.high, token)),
            static_cast<const double*>(entry(targets.ratio, token))};
  }

  template <class S>
  static void finish_as(const TargetTensors& targets, const Tensor& largest, const Tensor& sum, const Tensor& target,
                        Tensor& losses, Tensor& logsumexp) {
    const auto at = [](const Tensor& vector, int64_t i) -> S& { return static_cast<S*>(entry(vector, 0))[i]; };
    for (int64_t i = 0; i < losses.size(0); ++i) {
      const bool active = static_cast<const int64_t*>(entry(targets.low, 0))[i] >= 0;
      at(logsumexp, i) = active ? at(largest, i) + std::log(at(sum, i)) : 0;
      at(losses, i) = active ? at(logsumexp, i) - at(target, i) : 0;
    }
  }

  const char* op_;
  const bool double_;
  const cpu::PositionKernels& kernels_ = cpu::position_kernels();
};

std::tuple<Tensor, Tensor> coordinate_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& temporal,
                                                    const Tensor& height, const Tensor& width, const Tensor& labels,
                                                    const Tensor& axis, const Tensor& positions, int64_t ignore_index) {
  constexpr auto op = "coordinate_cross_entropy";
  const LossCall call = {hidden, weight, {temporal, height, width}, labels, axis, positions, ignore_index};
  check_loss(op, call);
  CpuLoss loss(op, hidden);
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
  CpuLoss loss(op, hidden);
  check_vector(op, {"grad_losses", grad_losses}, call.tokens(), {loss.wide}, {"hidden", hidden});
  check_vector(op, {"logsumexp", logsumexp}, call.tokens(), {loss.wide}, {"hidden", hidden});
  return loss_backward(op, call, torch::stable::contiguous(grad_losses), torch::stable::contiguous(logsumexp),
                       grad_hidden, grad_weight, grad_tables, loss);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llava_st, CPU, m) {
  m.impl("coordinate_cross_entropy", TORCH_BOX(&coordinate_cross_entropy));
  m.impl("coordinate_cross_entropy_backward", TORCH_BOX(&coordinate_cross_entropy_backward));
}

}  // namespace llava_st
