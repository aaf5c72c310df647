// Which region a warp works on, and where its keys lie.
#pragma once

#include "problem.cuh"

namespace llava_st::cuda {

/// The place of a token in its region. The launchers refuse regions with 2^31 tokens or more along one axis.
struct Place {
  uint32_t t, h, w;

  LLAVA_ST_DEVICE Place(uint32_t t, uint32_t h, uint32_t w) : t(t), h(h), w(w) {}
  LLAVA_ST_DEVICE explicit Place(Extent at)
      : t(static_cast<uint32_t>(at.t)), h(static_cast<uint32_t>(at.h)), w(static_cast<uint32_t>(at.w)) {}

  LLAVA_ST_DEVICE int64_t offset(const TokenStrides& strides) const { return strides.offset({t, h, w}); }
};

/// Number of a query's sample in a dense batch, and its region there.
struct DenseRegion {
  int64_t sample;
  Region region;

  template <class Problem>
  LLAVA_ST_DEVICE DenseRegion(const Problem& problem, int64_t query) : sample(problem.by_regions.quotient(query)) {
    const int64_t index = query - sample * problem.by_regions.divisor;
    const int64_t line = problem.by_regions_w.quotient(index);
    const int64_t t = problem.by_regions_h.quotient(line);
    region = region_at(problem.grid, problem.region,
                       Extent{t, line - t * problem.by_regions_h.divisor, index - line * problem.by_regions_w.divisor});
  }
};

/// The region of one query, wherever its sample lies, and one head.
struct Site {
  int64_t query;
  int64_t head;
  int64_t sample;  // number in the batch, where it is dense
  Extent grid;
  Region region;
  PackedOffset begin;  // of the video, where the batch is packed
  bool has_keys;       // packed: grids that promise more tokens than there are leave queries without any
  bool cut_short;      // packed: some of the region's tokens do not exist

  LLAVA_ST_DEVICE Site(const AttentionProblem& problem, int64_t row)
      : query(problem.by_heads.quotient(row)),
        head(row - query * problem.heads),
        sample(0),
        begin{0, 0},
        cut_short(false) {
    if (problem.packed()) {
      has_keys = query < problem.offsets[problem.videos].query;
      if (!has_keys) return;
      const int64_t video = video_of_query(problem.offsets, problem.videos, query);
      begin = problem.offsets[video];
      grid = problem.grids[video];
      region = region_at(grid, problem.region, query - begin.query);
      has_keys = key_exists(problem, {0, 0, 0});
      const Extent last = {region.size.t - 1, region.size.h - 1, region.size.w - 1};
      cut_short = !key_exists(problem, Place(last));
    } else {
      const DenseRegion dense(problem, query);
      sample = dense.sample;
      region = dense.region;
      grid = problem.grid;
      has_keys = true;
    }
  }

  /// Whether the token at `place` in the region of a packed video is there.
  LLAVA_ST_DEVICE bool key_exists(const AttentionProblem& problem, Place place) const {
    const TokenStrides tokens = packed_strides(grid, 1, 0);
    return begin.key + tokens.offset(region.first) + place.offset(tokens) < problem.keys;
  }

  template <class T>
  LLAVA_ST_DEVICE const T* query_row(const AttentionProblem& problem, const Operand<const T>& operand) const {
    const TokenStrides& strides = operand.strides;
    const int64_t token = problem.packed() ? query * strides.w : sample * strides.sample + strides.offset(region.at);
    return operand.data + token + head * strides.head;
  }
};

/// The rows of a region's tokens in one tensor.
template <class T>
struct RegionRows {
  T* first;
  TokenStrides strides;

  LLAVA_ST_DEVICE RegionRows(const AttentionProblem& problem, const Site& site, const Operand<T>& operand)
      : strides(operand.strides) {
    int64_t origin = site.sample * strides.sample;
    if (problem.packed()) {
      origin = site.begin.key * operand.strides.w;
      strides = packed_strides(site.grid, operand.strides.w, operand.strides.head);
    }
    first = settled(operand.data + origin + strides.offset(site.region.first) + site.head * strides.head);
  }

  LLAVA_ST_DEVICE T* at(Place place) const { return first + place.offset(strides); }
};

/// The places of a region's tokens, counted in row-major order.
///
/// An integer division takes some twenty instructions, a multiplication by a reciprocal in float two. For numbers below
/// 2^20 it is exact: (i + 1/2) / n is at least 1 / (2 n) away from every integer, more than the error of
/// i / n * 2^-22 that its three roundings can make.
struct Places {
  int64_t count;
  uint32_t rows_per_plane, per_row;
  float planes_per_token, rows_per_token;

  static constexpr int64_t kExactInFloat = 1 << 20;

  LLAVA_ST_DEVICE explicit Places(Extent size)
      : count(size.count()), rows_per_plane(static_cast<uint32_t>(size.h)), per_row(static_cast<uint32_t>(size.w)) {
    rows_per_token = fast_reciprocal(static_cast<float>(per_row));
    planes_per_token = fast_reciprocal(static_cast<float>(rows_per_plane * per_row));
  }

  /// Place number `i`. With `FEW` there are fewer than 2^20.
  template <bool FEW>
  LLAVA_ST_DEVICE Place at(int64_t i) const {
    if (FEW || count < kExactInFloat) {
      const uint32_t number = static_cast<uint32_t>(i);
      const float middle = static_cast<float>(number) + 0.5f;
      const uint32_t row = static_cast<uint32_t>(middle * rows_per_token);
      const uint32_t t = static_cast<uint32_t>(middle * planes_per_token);
      return {t, row - t * rows_per_plane, number - row * per_row};
    }
    const int64_t row = i / per_row;
    const int64_t t = row / rows_per_plane;
    return Place(Extent{t, row - t * rows_per_plane, i - row * per_row});
  }
};

}  // namespace llava_st::cuda
