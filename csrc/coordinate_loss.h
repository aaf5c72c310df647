// coordinate_cross_entropy without logits of all classes: what the CPU and the CUDA library share. Matrix products are
// torch's; what happens to a tile of logits between them is a kernel's. Nothing larger than a tile is held.
//
// Forward: for every tile of classes and tokens, its logits update running statistics of the tokens. Backward: the
// logits of a tile are computed again, become their gradients, and feed the gradients of both factors. Classes are the
// outer loop, so that the gradient of a class is a sum over tokens inside one product, and is rounded once.
#pragma once

#include <tuple>

#include "lape_call.h"
#include "torch_matrices.h"

namespace llava_st {

/// Tokens in a tile: enough for products at full speed, with as many classes.
constexpr int64_t kTileTokens = 4096;

/// The most logits, and classes, in a tile.
struct TileLimits {
  int64_t logits, classes;
};

struct LossCall {
  const Tensor &hidden, &weight;
  Tables tables;
  const Tensor &labels, &axis, &positions;
  int64_t ignore_index;

  int64_t tokens() const { return hidden.size(0); }
  int64_t channels() const { return hidden.size(1); }
  /// Rows of these, one after the other, are the classes.
  std::array<const Tensor*, 4> sources() const { return {&weight, &tables.temporal, &tables.height, &tables.width}; }
  int64_t classes() const { return weight.size(0) + tables.rows(); }
};

inline void check_loss(const char* op, const LossCall& call) {
  const Argument model = {"hidden", call.hidden};
  check_rank(op, model, 2, "[N, C]");
  check_rank(op, {"weight", call.weight}, 2, "[V, C]");
  check_shape(op, {"weight", call.weight}, {call.weight.size(0), call.channels()});
  check_same_kind(op, {"weight", call.weight}, model);
  check_tables(op, call.tables, call.channels(), model);
  check_vector(op, {"labels", call.labels}, call.tokens(), {ScalarType::Int, ScalarType::Long}, model);
  check_vector(op, {"axis", call.axis}, call.tokens(), {ScalarType::Char}, model);
  check_vector(op, {"positions", call.positions}, call.tokens(), {ScalarType::Double}, model);
}

/// The two classes of every token and the weight of the second, as int64, int64 and double `[N]`.
struct TargetTensors {
  Tensor low, high, ratio;

  TargetTensors(const char* op, const LossCall& call)
      : low(allocate(op, "the targets", {call.tokens()}, call.hidden, ScalarType::Long)),
        high(allocate(op, "the targets", {call.tokens()}, call.hidden, ScalarType::Long)),
        ratio(allocate(op, "the targets", {call.tokens()}, call.hidden, ScalarType::Double)) {}
};

/// Calls `visit(number of the source, row, classes, first, tokens in a tile)` for blocks of classes, none of which is
/// of two sources.
template <class Visit>
void for_class_blocks(const LossCall& call, TileLimits limits, const Visit& visit) {
  const int64_t tokens = smaller(kTileTokens, call.tokens());
  constexpr int64_t kMultiple = 64;  // what products like
  const int64_t most = smaller(limits.logits / tokens, limits.classes) / kMultiple * kMultiple;
  const auto sources = call.sources();
  int64_t first = 0;
  for (size_t number = 0; number < sources.size(); ++number) {
    const int64_t rows = sources[number]->size(0);
    for (int64_t row = 0; row < rows; row += most) visit(number, row, smaller(most, rows - row), first + row, tokens);
    first += rows;
  }
}

template <class Visit>
void for_token_tiles(const LossCall& call, int64_t tokens, const Visit& visit) {
  for (int64_t token = 0; token < call.tokens(); token += tokens) visit(token, smaller(tokens, call.tokens() - token));
}

/// Memory for a matrix of at most `most` numbers, seen in the shape that is wanted now.
class Buffer {
 public:
  Buffer(const char* op, const char* name, int64_t most, const Tensor& like, ScalarType dtype)
      : memory_(allocate(op, name, {most}, like, dtype)) {}

  Tensor matrix(int64_t rows, int64_t columns) const {
    return torch::stable::view(rows_of(memory_, 0, rows * columns), {rows, columns});
  }

 private:
  Tensor memory_;
};

/// Memory for one tile of logits.
inline Buffer logits_buffer(const char* op, const LossCall& call, TileLimits limits, ScalarType dtype) {
  int64_t most = 0;
  for_class_blocks(call, limits, [&](size_t, int64_t, int64_t classes, int64_t, int64_t tokens) {
    most = classes * tokens > most ? classes * tokens : most;
  });
  return Buffer(op, "a tile of logits", most, call.hidden, dtype);
}

/// The losses and the logarithms of the sums of exponentials, `[N]` each, 0 for tokens that are not active.
///
/// `backend` has: `wide`, the dtype of logits and statistics; `limits` of tiles; `operand(tensor, other)`, what enters
/// a product with a matrix of the dtype of `other`; `product(a, b, out)` with a wide result; `find_targets`, `update`
/// and `finish`.
template <class Backend>
std::tuple<Tensor, Tensor> loss_forward(const char* op, const LossCall& call, Backend& backend) {
  const auto vector = [&](const char* name) { return allocate(op, name, {call.tokens()}, call.hidden, backend.wide); };
  Tensor losses = vector("the losses"), logsumexp = vector("the logsumexp");
  if (call.tokens() == 0) return {losses, logsumexp};
  Tensor largest = vector("statistics"), sum = vector("statistics"), target = vector("statistics");
  TargetTensors targets(op, call);
  backend.start(call, targets, largest, sum, target);
  const Buffer logits = logits_buffer(op, call, backend.limits, backend.wide);
  for_class_blocks(call, backend.limits, [&](size_t number, int64_t row, int64_t classes, int64_t first, int64_t tile) {
    const Tensor& source = *call.sources()[number];
    const Tensor rows = backend.operand(rows_of(source, row, classes), call.hidden);
    for_token_tiles(call, tile, [&](int64_t token, int64_t tokens) {
      Tensor z = logits.matrix(tokens, classes);
      backend.product(backend.operand(rows_of(call.hidden, token, tokens), source), transposed(rows), z);
      backend.update(z, first, token, targets, largest, sum, target);
    });
  });
  backend.finish(targets, largest, sum, target, losses, logsumexp);
  return {losses, logsumexp};
}

using LossGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

/// The gradients of hidden, weight and the tables; empty tensors for those that are not wanted. `backend` has besides:
/// `find_targets`; `logit_gradient`, which gives the gradients of a tile of logits as an operand for products;
/// `accumulate(to, from)`; and `writes(result, operand)`, whether a product of such operands may go straight to a
/// result.
template <class Backend>
LossGradients loss_backward(const char* op, const LossCall& call, const Tensor& grad_losses, const Tensor& logsumexp,
                            bool grad_hidden, bool grad_weight, bool grad_tables, Backend& backend) {
  const auto like = [&](const char* name, const Tensor& tensor, bool wanted) {
    return wanted ? allocate(op, name, {tensor.size(0), tensor.size(1)}, tensor) : allocate(op, name, {0}, tensor);
  };
  Tensor of_hidden = like("the gradient of hidden", call.hidden, grad_hidden);
  const auto sources = call.sources();
  std::array<Tensor, 4> of_sources = {like("the gradient of weight", *sources[0], grad_weight),
                                      like("the gradient of temporal", *sources[1], grad_tables),
                                      like("the gradient of height", *sources[2], grad_tables),
                                      like("the gradient of width", *sources[3], grad_tables)};
  const auto result = [&] {
    return LossGradients{of_hidden, of_sources[0], of_sources[1], of_sources[2], of_sources[3]};
  };
  if (call.tokens() == 0 || call.channels() == 0) {
    for (Tensor& each : of_sources) torch::stable::zero_(each);
    return result();
  }
  TargetTensors targets(op, call);
  backend.find_targets(call, targets);
  const Buffer logits = logits_buffer(op, call, backend.limits, backend.wide);
  const bool is_wide = call.hidden.scalar_type() == backend.wide;
  Tensor hidden_sum = is_wide || !grad_hidden ? of_hidden
                                              : allocate(op, "the gradient of hidden", {call.tokens(), call.channels()},
                                                         call.hidden, backend.wide);
  const Buffer product_buffer(op, "a product", grad_hidden ? smaller(kTileTokens, call.tokens()) * call.channels() : 0,
                              call.hidden, backend.wide);

  for_class_blocks(call, backend.limits, [&](size_t number, int64_t row, int64_t classes, int64_t first, int64_t tile) {
    const Tensor& source = *sources[number];
    const bool wanted = number == 0 ? grad_weight : grad_tables;
    if (!wanted && !grad_hidden) return;
    const Tensor rows = backend.operand(rows_of(source, row, classes), call.hidden);
    Tensor of_rows = wanted ? rows_of(of_sources[number], row, classes) : of_sources[number];
    // Products go straight to the gradient where they have its dtype and there is one; else they are summed first.
    const bool straight = wanted && tile >= call.tokens() && backend.writes(of_rows, rows);
    Tensor rows_sum = wanted && !straight
                          ? allocate(op, "a gradient of classes", {classes, call.channels()}, call.hidden, backend.wide)
                          : of_rows;
    Tensor rows_part = wanted && tile < call.tokens() ? allocate(op, "a gradient of classes",
                                                                 {classes, call.channels()}, call.hidden, backend.wide)
                                                      : of_rows;
    for_token_tiles(call, tile, [&](int64_t token, int64_t tokens) {
      const Tensor h = backend.operand(rows_of(call.hidden, token, tokens), source);
      Tensor z = logits.matrix(tokens, classes);
      backend.product(h, transposed(rows), z);
      const Tensor gradient = backend.logit_gradient(z, first, token, targets, logsumexp, grad_losses, h);
      if (grad_hidden) {
        Tensor sum = rows_of(hidden_sum, token, tokens);
        if (first == 0) {
          backend.product(gradient, rows, sum);
        } else {
          Tensor part = product_buffer.matrix(tokens, call.channels());
          backend.product(gradient, rows, part);
          backend.accumulate(sum, part);
        }
      }
      if (!wanted) return;
      if (straight) {
        multiply(transposed(gradient), h, of_rows);
      } else if (token == 0) {
        backend.product(transposed(gradient), h, rows_sum);
      } else {
        backend.product(transposed(gradient), h, rows_part);
        backend.accumulate(rows_sum, rows_part);
      }
    });
    if (wanted && !straight) torch::stable::copy_(of_rows, rows_sum);
  });
  if (grad_hidden && !is_wide) torch::stable::copy_(of_hidden, hidden_sum);
  return result();
}

}  // namespace llava_st
