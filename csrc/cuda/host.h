// The thin layer through which launchers reach torch and the CUDA runtime. Under a host compiler the emulator in
// tests/emulator stands in, so that the launchers, with all their checks, run on a CPU as well.
#pragma once

#include "../checks.h"
#include "hardware.cuh"

#if !defined(__CUDACC__)
#include "emulated_host.h"
#else

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

/// Registers kernels for CUDA tensors: LLAVA_ST_CUDA_KERNELS(module) { module.impl(...); }
#define LLAVA_ST_CUDA_KERNELS(module) STABLE_TORCH_LIBRARY_IMPL(llava_st, CUDA, module)

namespace llava_st::cuda {

/// For as long as it lives, launches go to a tensor's device, on the current stream there.
class Device {
 public:
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }

  void* stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

/// What kernels read, where they write, and what they do both to.
template <class T>
const T* input_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* result_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
T* updated_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

/// Whether kernels cannot read a tensor because it is in the host's memory.
inline bool on_host(const Tensor& tensor) { return tensor.is_cpu(); }

inline bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}

/// Copies from pageable memory, which is free to change as soon as the call returns. Not so in a graph, which would
/// read it again in every replay.
inline void copy_to_device(void* to, const void* from, size_t bytes, void* stream) {
  STD_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
}

/// Raises what went wrong with the launches so far.
inline void check_launches() { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

}  // namespace llava_st::cuda

#endif
