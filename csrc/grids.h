// `grid_thw`: the sizes of videos and images that are packed along one axis, checked.
#pragma once

#include "checks.h"
#include "geometry/regions.h"

namespace llava_st {

/// Checks all but the contents, which may live on a GPU and are not read back from there.
inline void check_grid_thw(const char* op, const Tensor& grid_thw, Argument tokens) {
  const bool integral = grid_thw.scalar_type() == ScalarType::Int || grid_thw.scalar_type() == ScalarType::Long;
  LLAVA_ST_CHECK(integral, op, ": grid_thw must be int32 or int64, got ", to_text(grid_thw.scalar_type()));
  LLAVA_ST_CHECK(grid_thw.dim() == 2 && grid_thw.size(1) == 3, op,
                 ": grid_thw must have shape [videos, 3] (time, height, width), got ", to_text(grid_thw.sizes()));
  LLAVA_ST_CHECK(grid_thw.is_cpu() || same_device(grid_thw, tokens.tensor), op,
                 ": grid_thw must be on the CPU or on the device of ", tokens.name, ", ", device_text(tokens.tensor),
                 ", got ", device_text(grid_thw));
}

/// The grids of a packed batch and where each video begins, with one more offset for the totals.
struct PackedGrids {
  std::vector<Extent> grids;
  std::vector<PackedOffset> offsets;
};

/// Reads a `grid_thw` that lives on the CPU and checks that it holds just the `tokens` of the argument called `name`.
/// Queries are counted as one per region.
inline PackedGrids read_grids(const char* op, const Tensor& grid_thw, Extent region, int64_t tokens, const char* name) {
  const auto read = [&](int64_t video, int64_t axis) -> int64_t {
    const int64_t at = video * grid_thw.stride(0) + axis * grid_thw.stride(1);
    return grid_thw.scalar_type() == ScalarType::Long ? static_cast<const int64_t*>(grid_thw.const_data_ptr())[at]
                                                      : static_cast<const int32_t*>(grid_thw.const_data_ptr())[at];
  };
  const int64_t videos = grid_thw.size(0);
  PackedGrids packed;
  packed.grids.reserve(videos);
  packed.offsets.reserve(videos + 1);
  PackedOffset end = {0, 0};
  for (int64_t video = 0; video < videos; ++video) {
    const Extent grid = {read(video, 0), read(video, 1), read(video, 2)};
    LLAVA_ST_CHECK(grid.t >= 0 && grid.h >= 0 && grid.w >= 0, op, ": grid_thw must not be negative, got [", grid.t,
                   ", ", grid.h, ", ", grid.w, "] for video ", video);
    packed.grids.push_back(grid);
    packed.offsets.push_back(end);
    int64_t count;
    const bool fits = !__builtin_mul_overflow(grid.t, grid.h, &count) &&
                      !__builtin_mul_overflow(count, grid.w, &count) &&
                      !__builtin_add_overflow(end.key, count, &end.key) && end.key <= tokens;
    LLAVA_ST_CHECK(fits, op, ": grid_thw must add up to the ", tokens, " tokens of ", name, ", but its first ",
                   video + 1, " rows hold more");
    if (count > 0) end.query += regions_of(grid, region).count();
  }
  packed.offsets.push_back(end);
  LLAVA_ST_CHECK(end.key == tokens, op, ": grid_thw must add up to the ", tokens, " tokens of ", name, ", got ",
                 end.key);
  return packed;
}

}  // namespace llava_st
