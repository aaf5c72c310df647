// `grid_thw` made ready for kernels: copied from the host, where it was checked, or read on the device.
#pragma once

#include <algorithm>

#include "../grids.h"
#include "host.h"
#include "packed_grids.cuh"

namespace llava_st {

/// The device memory that holds the grids and offsets of a packed batch.
class DeviceGrids {
 public:
  DeviceGrids(const char* op, int64_t videos, int64_t tokens, const Tensor& like)
      : memory_(allocate(op, "the offsets of grid_thw", {2 * (videos + 1) + 3 * videos}, like, ScalarType::Long)),
        offsets_(reinterpret_cast<PackedOffset*>(cuda::result_data<int64_t>(memory_))),
        grids_(reinterpret_cast<Extent*>(reinterpret_cast<int64_t*>(offsets_) + 2 * (videos + 1))),
        videos_(videos),
        tokens_(tokens) {}

  cuda::PackedVideos videos() const { return {offsets_, grids_, videos_, tokens_}; }

  /// What was read and checked on the host; `model` names the tensor whose device the grids could be on as well.
  void upload(const char* op, const PackedGrids& packed, const char* model, void* stream) {
    LLAVA_ST_CHECK(!cuda::is_capturing(stream), op, ": grid_thw must be on the device of ", model,
                   " while a CUDA graph is captured, got cpu");
    const auto copy = [&](void* to, const auto& from) {
      cuda::copy_to_device(to, from.data(), from.size() * sizeof(from[0]), stream);
    };
    copy(offsets_, packed.offsets);
    copy(grids_, packed.grids);
  }

  /// Reads a `grid_thw` on the device there; offsets count the regions as well.
  void locate(const Tensor& grid_thw, Extent region, void* stream) {
    const Tensor grids = torch::stable::contiguous(grid_thw);
    if (grids.scalar_type() == ScalarType::Long) {
      launch(cuda::input_data<int64_t>(grids), region, stream);
    } else {
      launch(cuda::input_data<int32_t>(grids), region, stream);
    }
    cuda::check_launches();
  }

 private:
  template <class Integer>
  void launch(const Integer* grid_thw, Extent region, void* stream) {
    cuda::launch<cuda::locate_videos<Integer>>({1, cuda::kScanThreads, stream}, grid_thw, videos_, region, tokens_,
                                               offsets_, grids_);
  }

  Tensor memory_;
  PackedOffset* offsets_;
  Extent* grids_;
  int64_t videos_, tokens_;
};

/// Along each axis the size of the longest video.
inline Extent longest_of(const std::vector<Extent>& grids) {
  Extent longest = {0, 0, 0};
  for (const Extent& grid : grids) {
    longest = {std::max(longest.t, grid.t), std::max(longest.h, grid.h), std::max(longest.w, grid.w)};
  }
  return longest;
}

}  // namespace llava_st
