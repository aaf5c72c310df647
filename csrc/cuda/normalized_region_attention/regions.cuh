// Where the rows of a region are: those of its tokens, and those of its query.
#pragma once

#include "../point_to_region_attention/site.cuh"
#include "problem.cuh"

namespace llava_st::cuda {

/// The region of query number `query`.
struct QueryRegion : DenseRegion {
  using DenseRegion::DenseRegion;

  template <class T>
  LLAVA_ST_DEVICE const T* query_row(const Operand<const T>& operand, int64_t head) const {
    const TokenStrides& strides = operand.strides;
    return operand.data + sample * strides.sample + strides.offset(region.at) + head * strides.head;
  }
};

/// The rows of a region's tokens in one tensor, in row-major order. FEW: there are fewer than 2^20.
template <class T, bool FEW>
struct TokenRows {
  Places places;
  const TokenStrides& strides;
  T* first;

  LLAVA_ST_DEVICE TokenRows(const QueryRegion& of, const Operand<T>& operand)
      : places(of.region.size),
        strides(operand.strides),
        first(settled(operand.data + of.sample * strides.sample + strides.offset(of.region.first))) {}

  LLAVA_ST_DEVICE int64_t count() const { return places.count; }
  LLAVA_ST_DEVICE bool has(int64_t i) const { return i < places.count; }
  LLAVA_ST_DEVICE T* at(int64_t i) const { return first + places.at<FEW>(i).offset(strides); }
};

}  // namespace llava_st::cuda
