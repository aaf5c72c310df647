// What calls of linear_lape_gelu and gelu_linear_gradient must fulfil: for the CPU and the CUDA library.
#pragma once

#include "lape_call.h"
#include "torch_matrices.h"

namespace llava_st {

/// A checked call of linear_lape_gelu: one row of features for every place of a grid.
struct LinearCall {
  Tensor features;  // `[rows, K]`: a view, or a copy where strides do not allow one
  const Tensor &weight, &bias;
  Tables tables;
  int64_t samples;
  Extent grid;

  int64_t rows() const { return features.size(0); }
  int64_t inputs() const { return weight.size(1); }
  int64_t channels() const { return weight.size(0); }
  /// Of the results.
  std::vector<int64_t> shape() const { return {samples, grid.t, grid.h, grid.w, channels()}; }
};

inline LinearCall check_linear(const char* op, const Tensor& features, const Tensor& weight, const Tensor& bias,
                               const Tensor& temporal, const Tensor& height, const Tensor& width) {
  const Argument model = {"features", features};
  const Tables tables = {temporal, height, width};
  check_rank(op, model, 5, "[B, T, H, W, K]");
  check_rank(op, {"weight", weight}, 2, "[N, K]");
  const int64_t channels = weight.size(0), inputs = features.size(4);
  check_shape(op, {"weight", weight}, {channels, inputs});
  check_same_kind(op, {"weight", weight}, model);
  check_tables(op, tables, channels, model);
  const auto all = tables.all();
  for (size_t axis = 0; axis < all.size(); ++axis) check_shape(op, all[axis], {features.size(1 + axis), channels});
  check_shape(op, {"bias", bias}, {channels});
  check_same_kind(op, {"bias", bias}, {"temporal", temporal});
  const Extent grid = {features.size(1), features.size(2), features.size(3)};
  const int64_t rows = features.size(0) * grid.count();
  return {torch::stable::reshape(features, {rows, inputs}), weight, bias, tables, features.size(0), grid};
}

inline void check_gelu_gradient(const char* op, const Tensor& grad_output, const Tensor& weight,
                                const Tensor& preactivation) {
  const Argument model = {"preactivation", preactivation};
  check_rank(op, model, 2, "[tokens, N]");
  check_rank(op, {"weight", weight}, 2, "[M, N]");
  check_shape(op, {"weight", weight}, {weight.size(0), preactivation.size(1)});
  check_shape(op, {"grad_output", grad_output}, {preactivation.size(0), weight.size(0)});
  check_same_kind(op, {"weight", weight}, model);
  check_same_kind(op, {"grad_output", grad_output}, model);
}

}  // namespace llava_st
