// Bias and tables of a call of linear_lape_gelu as its kernels read them.
#pragma once

#include "../../lape_mlp_call.h"
#include "../host.h"
#include "../operand.cuh"

namespace llava_st {

/// A table, or the bias, in float, contiguous and aligned for packets of sixteen bytes.
inline Tensor float_table(const Tensor& table) {
  constexpr int packet = sizeof(cuda::Words) / sizeof(float);
  const Tensor rows = torch::stable::contiguous(torch::stable::to(table, ScalarType::Float));
  const bool fits = cuda::aligned(static_cast<const float*>(rows.const_data_ptr()), packet);
  return fits ? rows : torch::stable::clone(rows);
}

struct FloatPositions {
  Tensor bias, temporal, height, width;

  explicit FloatPositions(const LinearCall& call)
      : bias(float_table(call.bias)),
        temporal(float_table(call.tables.temporal)),
        height(float_table(call.tables.height)),
        width(float_table(call.tables.width)) {}
};

}  // namespace llava_st
