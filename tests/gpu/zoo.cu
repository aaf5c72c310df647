// The right twins of the emulator's zoo (tests/emulator/zoo.cuh) for a GPU: what the emulator says of the hardware is
// compared with the hardware.
#include <cuda_runtime_api.h>

#include <cstring>

#include "zoo.cuh"

using namespace llava_st::cuda;

namespace {

template <auto kernel>
cudaError_t run(int64_t blocks, const float* input, float* result) {
  const size_t read = zoo::kInputs * sizeof(float), written = zoo::kResults * sizeof(float);
  float* memory = nullptr;
  cudaError_t error = cudaMalloc(&memory, read + written);
  if (error != cudaSuccess) return error;
  float* const output = memory + zoo::kInputs;
  cudaMemcpy(memory, input, read, cudaMemcpyHostToDevice);
  cudaMemset(output, 0, written);
  launch<kernel>({blocks, zoo::kThreads, nullptr}, static_cast<const float*>(memory), output);
  error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaMemcpy(result, output, written, cudaMemcpyDeviceToHost);
  cudaFree(memory);
  return error;
}

struct Runner {
  const char* name;
  const float* input;
  float* result;
  int status = -1;  // no such kernel

  template <auto wrong, auto right>
  void operator()(const char* kernel, int64_t blocks) {
    if (std::strcmp(name, kernel) == 0) status = static_cast<int>(run<right>(blocks, input, result));
  }
};

}  // namespace

/// Runs the right twin of a kernel; returns a cudaError_t, or -1 where there is no such kernel.
extern "C" int llava_st_run_zoo(const char* name, const float* input, float* result) {
  Runner runner = {name, input, result};
  zoo::visit_zoo(runner);
  return runner.status;
}
