// Index arithmetic of point-to-region attention, shared by the CPU kernels, the CUDA kernels and the tests.
//
// A grid of T x H x W tokens is cut into non-overlapping regions of rt x rh x rw tokens; regions at the far edges may
// be partial. There is one query per region. Everything counts in elements or tokens, never bytes, and in 64 bits.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LLAVA_ST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LLAVA_ST_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace llava_st {

struct Extent {
  int64_t t, h, w;

  LLAVA_ST_HOST_DEVICE int64_t count() const { return t * h * w; }
};

/// a / b rounded up, for a >= 0 and b > 0 of any size.
LLAVA_ST_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return a == 0 ? 0 : (a - 1) / b + 1; }

LLAVA_ST_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/// How many regions (and so queries) a grid has along each axis.
LLAVA_ST_HOST_DEVICE Extent regions_of(Extent grid, Extent region) {
  return {ceil_div(grid.t, region.t), ceil_div(grid.h, region.h), ceil_div(grid.w, region.w)};
}

/// One region: `size` tokens from `first` on, clipped at the edge of the grid; `at` is its place among the regions,
/// and so the place of its query.
struct Region {
  Extent first;
  Extent size;
  Extent at;
};

/// The region at the place `at` among the regions of a grid.
LLAVA_ST_HOST_DEVICE Region region_at(Extent grid, Extent region, Extent at) {
  const Extent first = {at.t * region.t, at.h * region.h, at.w * region.w};
  const Extent size = {smaller(region.t, grid.t - first.t), smaller(region.h, grid.h - first.h),
                       smaller(region.w, grid.w - first.w)};
  return {first, size, at};
}

/// Region number `index` of a grid, counted in row-major order.
LLAVA_ST_HOST_DEVICE Region region_at(Extent grid, Extent region, int64_t index) {
  const Extent regions = regions_of(grid, region);
  const Extent at = {index / regions.w / regions.h, index / regions.w % regions.h, index % regions.w};
  return region_at(grid, region, at);
}

/// Strides, in elements, of a `[sample, T, H, W, heads, D]` tensor whose last dimension is contiguous.
struct TokenStrides {
  int64_t sample, t, h, w, head;

  LLAVA_ST_HOST_DEVICE int64_t offset(Extent at) const { return at.t * t + at.h * h + at.w * w; }
};

/// Videos of different sizes, packed along one token axis, seen as one video with a grid of its own: the strides that
/// a packed `[tokens, heads, D]` tensor with `token` elements per token has inside a video of size `grid`.
LLAVA_ST_HOST_DEVICE TokenStrides packed_strides(Extent grid, int64_t token, int64_t head) {
  return {0, grid.h * grid.w * token, grid.w * token, token, head};
}

/// Where video number i of a packed batch begins, in keys and in queries. Entry `videos` holds the totals.
struct PackedOffset {
  int64_t key, query;
};

/// The video that position `at` on the packed axis of `which` belongs to: the last one that begins at or before it and
/// is not empty. `offsets` has `videos + 1` entries and `at` is less than the last.
template <int64_t PackedOffset::* which>
LLAVA_ST_HOST_DEVICE int64_t video_of(const PackedOffset* offsets, int64_t videos, int64_t at) {
  int64_t low = 0, high = videos;  // the answer lies in [low, high)
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (offsets[middle].*which <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// The video that packed query number `query` belongs to.
LLAVA_ST_HOST_DEVICE int64_t video_of_query(const PackedOffset* offsets, int64_t videos, int64_t query) {
  return video_of<&PackedOffset::query>(offsets, videos, query);
}

/// The video that packed token number `key` belongs to.
LLAVA_ST_HOST_DEVICE int64_t video_of_key(const PackedOffset* offsets, int64_t videos, int64_t key) {
  return video_of<&PackedOffset::key>(offsets, videos, key);
}

}  // namespace llava_st
