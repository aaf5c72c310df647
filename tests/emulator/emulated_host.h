// What csrc/cuda/host.h offers launchers, done by the emulator. Included by it, not by itself.
//
// Tensors on the CPU play the part of tensors on the device, under ops of a namespace of their own.
#pragma once

#include <torch/csrc/stable/library.h>

#include <mutex>

#include "emulator.h"

#define LLAVA_ST_CUDA_KERNELS(module) STABLE_TORCH_LIBRARY_IMPL(llava_st_emulated, CPU, module)

namespace llava_st::cuda {

/// Lives as long as one call of an op; what earlier calls used is gone by then.
class Device {
 public:
  explicit Device(const Tensor&) : lock_(emulator::lock()) { emulator::forget_memory(); }

  void* stream = nullptr;

 private:
  std::lock_guard<std::mutex> lock_;
};

/// From a tensor's first element to its last.
inline size_t span_in_bytes(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) == 0) return 0;
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  return (last + 1) * tensor.element_size();
}

template <class T>
const T* input_data(const Tensor& tensor) {
  emulator::allow_reading(tensor.const_data_ptr(), span_in_bytes(tensor));
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* result_data(Tensor& tensor) {
  emulator::allow_writing(tensor.mutable_data_ptr(), span_in_bytes(tensor));
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
T* updated_data(Tensor& tensor) {
  emulator::allow_updating(tensor.mutable_data_ptr(), span_in_bytes(tensor));
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline bool on_host(const Tensor&) { return !emulator::settings().tensors_on_device; }
inline bool is_capturing(void*) { return false; }
inline void copy_to_device(void* to, const void* from, size_t bytes, void*) {
  emulator::copy_to_device(to, from, bytes);
}
inline void check_launches() { emulator::check_launchers(); }

}  // namespace llava_st::cuda
