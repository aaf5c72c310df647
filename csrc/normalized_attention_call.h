// What a call of normalized region attention means, checked: the part of the op that the CPU and the CUDA library
// share.
#pragma once

#include "attention_call.h"

namespace llava_st {

/// A checked call over a `[B, T, H, W, E]` grid whose tokens all heads share.
struct NormalizedCall {
  int64_t batch;
  Extent grid, region;
  int64_t heads, width;  // E, the channels of a token
  double eps;

  std::vector<int64_t> query_shape() const {
    const Extent regions = regions_of(grid, region);
    return {batch, regions.t, regions.h, regions.w, heads, width};
  }
};

inline NormalizedCall check_normalized(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                                       const std::vector<int64_t>& region, double eps) {
  NormalizedCall call;
  call.region = check_region(op, region);
  check_rank(op, {"query", query}, 6, "[B, T', H', W', heads, E]");
  check_rank(op, {"key", key}, 5, "[B, T, H, W, E]");
  check_same_kind(op, {"key", key}, {"query", query});
  check_same_kind(op, {"value", value}, {"query", query});
  check_shape(op, {"value", value}, {key.sizes().begin(), key.sizes().end()});
  call.batch = key.size(0);
  call.grid = {key.size(1), key.size(2), key.size(3)};
  call.heads = query.size(4);
  call.width = key.size(4);
  check_shape(op, {"query", query}, call.query_shape());
  LLAVA_ST_CHECK(call.width > 0, op, ": key must have at least one channel to normalise over, got ",
                 to_text(key.sizes()));
  LLAVA_ST_CHECK(std::isfinite(eps) && eps >= 0, op, ": eps must be a finite number, not below 0, got ", eps);
  call.eps = eps;
  return call;
}

/// That a gradient of the output is like the output, and so like the query.
inline void check_normalized_gradient(const char* op, const Tensor& grad_output, const Tensor& query,
                                      const NormalizedCall& call) {
  check_same_kind(op, {"grad_output", grad_output}, {"query", query});
  check_shape(op, {"grad_output", grad_output}, call.query_shape());
}

}  // namespace llava_st
