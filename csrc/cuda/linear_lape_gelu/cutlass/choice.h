// Which of CUTLASS's products runs, if any: by the environment, the architecture and the shape. Nothing is measured at
// run time.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <string_view>

namespace llava_st::cuda {

enum class Fused { kNone, kSm80, kSm90 };

/// Off unless it is asked for: on no GPU have they shown yet that they are right, and faster than cuBLAS with a kernel
/// behind it.
inline bool wants_cutlass() {
  const char* const setting = std::getenv("LLAVA_ST_CUTLASS");
  return setting != nullptr && std::string_view(setting) == "1";
}

struct Gpu {
  int major = 0, multiprocessors = 0;

  /// The current one, as the driver knows it without asking the device.
  static Gpu current() {
    Gpu gpu;
    int device = 0;
    const bool found =
        cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&gpu.major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
    return found ? gpu : Gpu{};
  }
};

struct FusedChoice {
  int major;
  Fused product;
};

/// By compute capability. Those of 10 multiply with instructions that neither has.
constexpr FusedChoice kFusedChoices[] = {
#if defined(LLAVA_ST_CUTLASS_SM80)
    {8, Fused::kSm80},
    {12, Fused::kSm80},
#endif
#if defined(LLAVA_ST_CUTLASS_SM90)
    {9, Fused::kSm90},
#endif
};

constexpr int64_t kFusedTile = 128;  // of rows and of channels, in both

/// Where tiles are too few for all multiprocessors, cuBLAS has smaller ones.
inline Fused choose_fused(const Gpu& gpu, int64_t rows, int64_t channels) {
  const int64_t tiles = ((rows + kFusedTile - 1) / kFusedTile) * ((channels + kFusedTile - 1) / kFusedTile);
  if (tiles < gpu.multiprocessors) return Fused::kNone;
  for (const FusedChoice& choice : kFusedChoices) {
    if (choice.major == gpu.major) return choice.product;
  }
  return Fused::kNone;
}

}  // namespace llava_st::cuda
