// What a call of point-to-region attention means, checked: the part of the op that the CPU and the CUDA library share.
#pragma once

#include <cmath>
#include <optional>

#include "grids.h"

namespace llava_st {

constexpr int64_t kMaxHeadDim = 1152;

using OptionalScale = std::optional<double>;
using OptionalTensor = std::optional<Tensor>;

/// A checked call over a dense `[B, T, H, W, heads, D]` grid. Values, and so the output, have a width of their own.
struct DenseCall {
  int64_t batch;
  Extent grid, region;
  int64_t heads, head_dim, value_dim;
  double scale;

  std::vector<int64_t> query_shape() const { return query_rows(head_dim); }
  std::vector<int64_t> output_shape() const { return query_rows(value_dim); }

 private:
  std::vector<int64_t> query_rows(int64_t width) const {
    const Extent regions = regions_of(grid, region);
    return {batch, regions.t, regions.h, regions.w, heads, width};
  }
};

/// A checked call over packed `[tokens, heads, D]` videos. The grids themselves are checked apart: they may live on a
/// GPU, where they are not read back.
struct PackedCall {
  Extent region;
  int64_t keys, queries, videos;
  int64_t heads, head_dim, value_dim;
  double scale;

  std::vector<int64_t> query_shape() const { return {queries, heads, head_dim}; }
  std::vector<int64_t> output_shape() const { return {queries, heads, value_dim}; }
};

inline Extent check_region(const char* op, const std::vector<int64_t>& region) {
  const bool valid = region.size() == 3 && region[0] > 0 && region[1] > 0 && region[2] > 0;
  LLAVA_ST_CHECK(valid, op, ": region must be three positive sizes (time, height, width), got ", to_text(region));
  return {region[0], region[1], region[2]};
}

inline double check_scale(const char* op, OptionalScale scale, int64_t head_dim) {
  if (!scale) return head_dim > 0 ? 1.0 / std::sqrt(static_cast<double>(head_dim)) : 1.0;
  LLAVA_ST_CHECK(std::isfinite(*scale), op, ": scale must be finite, got ", *scale);
  return *scale;
}

inline void check_head_dim(const char* op, const char* of, int64_t head_dim) {
  LLAVA_ST_CHECK(head_dim <= kMaxHeadDim, op, ": the head dimension (last of ", of, ") must be at most ", kMaxHeadDim,
                 ", got ", head_dim);
}

/// That values are like keys, but for their width, and a bias has a number for each key and head.
inline void check_value_and_bias(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                                 const OptionalTensor& bias) {
  std::vector<int64_t> shape = {key.sizes().begin(), key.sizes().end()};
  shape.back() = value.dim() == key.dim() ? value.size(value.dim() - 1) : shape.back();
  check_shape(op, {"value", value}, shape);
  check_head_dim(op, "query", key.size(key.dim() - 1));
  check_head_dim(op, "value", shape.back());
  if (!bias) return;
  check_same_kind(op, {"bias", *bias}, {"query", query});
  shape.pop_back();
  check_shape(op, {"bias", *bias}, shape);
}

inline DenseCall check_dense(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                             const std::vector<int64_t>& region, OptionalScale scale, const OptionalTensor& bias) {
  DenseCall call;
  call.region = check_region(op, region);
  check_rank(op, {"query", query}, 6, "[B, T', H', W', heads, D]");
  check_rank(op, {"key", key}, 6, "[B, T, H, W, heads, D]");
  check_same_kind(op, {"key", key}, {"query", query});
  check_same_kind(op, {"value", value}, {"query", query});
  call.batch = key.size(0);
  call.grid = {key.size(1), key.size(2), key.size(3)};
  call.heads = key.size(4);
  call.head_dim = key.size(5);
  check_value_and_bias(op, query, key, value, bias);
  check_shape(op, {"query", query}, call.query_shape());
  call.value_dim = value.size(5);
  call.scale = check_scale(op, scale, call.head_dim);
  return call;
}

inline PackedCall check_packed(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                               const Tensor& grid_thw, const std::vector<int64_t>& region, OptionalScale scale,
                               const OptionalTensor& bias) {
  PackedCall call;
  call.region = check_region(op, region);
  check_rank(op, {"query", query}, 3, "[queries, heads, D]");
  check_rank(op, {"key", key}, 3, "[tokens, heads, D]");
  check_same_kind(op, {"key", key}, {"query", query});
  check_same_kind(op, {"value", value}, {"query", query});
  call.queries = query.size(0);
  call.keys = key.size(0);
  call.heads = key.size(1);
  call.head_dim = key.size(2);
  check_value_and_bias(op, query, key, value, bias);
  check_shape(op, {"query", query}, call.query_shape());
  call.value_dim = value.size(2);
  call.scale = check_scale(op, scale, call.head_dim);

  check_grid_thw(op, grid_thw, {"query", query});
  call.videos = grid_thw.size(0);
  return call;
}

/// Reads and checks a `grid_thw` that lives on the CPU.
inline PackedGrids read_grids(const char* op, const Tensor& grid_thw, const PackedCall& call) {
  PackedGrids packed = read_grids(op, grid_thw, call.region, call.keys, "key");
  const int64_t queries = packed.offsets.back().query;
  LLAVA_ST_CHECK(queries == call.queries, op, ": query must have one row per region of grid_thw, ", queries, ", got ",
                 call.queries);
  return packed;
}

/// Strides of a dense tensor in the order that the kernels use.
inline TokenStrides dense_strides(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3), tensor.stride(4)};
}

}  // namespace llava_st
