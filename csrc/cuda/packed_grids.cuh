// The bookkeeping of packed batches, on the device: the grid of each video, and where it begins.
#pragma once

#include "../geometry/regions.h"
#include "hardware.cuh"

namespace llava_st::cuda {

constexpr int kScanThreads = 256;

/// Videos one after the other, as kernels see them. All of it is on the device.
struct PackedVideos {
  const PackedOffset* offsets;  // videos + 1 of them
  const Extent* grids;
  int64_t videos;
  int64_t tokens;  // there are, whatever the grids say
};

/// A video's grid, cut down to what `keys` tokens can fill. Regions that hold any of the first `keys` tokens keep their
/// tokens and their numbers, and sizes that make no sense cannot overflow what is calculated from them.
LLAVA_ST_DEVICE Extent sensible_grid(Extent grid, int64_t keys) {
  if (grid.t <= 0 || grid.h <= 0 || grid.w <= 0 || keys <= 0) return {0, 0, 0};
  const int64_t w = smaller(grid.w, keys);
  const int64_t h = smaller(grid.h, ceil_div(keys, w));
  const int64_t t = smaller(grid.t, ceil_div(keys, h * w));
  return {t, h, w};
}

LLAVA_ST_DEVICE PackedOffset sum_of(PackedOffset a, PackedOffset b) { return {a.key + b.key, a.query + b.query}; }

/// Reads `grid_thw`, `[videos, 3]`, and writes the grids and, `videos + 1` of them, where the videos begin. One block.
template <class Integer>
LLAVA_ST_GLOBAL void LLAVA_ST_LAUNCH_BOUNDS(kScanThreads, 1)
    locate_videos(const Integer* grid_thw, int64_t videos, Extent region, int64_t keys, PackedOffset* offsets,
                  Extent* grids) {
  LLAVA_ST_SHARED(PackedOffset, ends, kScanThreads);
  const int thread = thread_index();
  PackedOffset begin = {0, 0};  // of the videos that this round looks at
  for (int64_t first = 0; first < videos; first += kScanThreads) {
    const int64_t video = first + thread;
    Extent grid = {0, 0, 0};
    if (video < videos) {
      const Integer* sizes = grid_thw + 3 * video;
      grid = sensible_grid({sizes[0], sizes[1], sizes[2]}, keys);
      grids[video] = grid;
    }
    ends[thread] = {grid.count(), regions_of(grid, region).count()};
    block_barrier();
    for (int distance = 1; distance < kScanThreads; distance *= 2) {
      PackedOffset sum = ends[thread];
      if (thread >= distance) sum = sum_of(sum, ends[thread - distance]);
      block_barrier();
      ends[thread] = sum;
      block_barrier();
    }
    if (video < videos) offsets[video + 1] = sum_of(begin, ends[thread]);
    begin = sum_of(begin, ends[kScanThreads - 1]);
    block_barrier();
  }
  if (thread == 0) offsets[0] = {0, 0};
}

}  // namespace llava_st::cuda
