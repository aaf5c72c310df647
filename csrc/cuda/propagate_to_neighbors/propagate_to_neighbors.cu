// propagate_to_neighbors on CUDA.
#include "../../geometry/regions.h"
#include "../../propagation_call.h"
#include "../element_types.h"
#include "../host.h"
#include "propagate_to_neighbors.cuh"

namespace llava_st {
namespace {

template <class T>
void run(const Tensor& x, Tensor& y, void* stream) {
  const int64_t rows = x.size(0), channels = x.size(1);
  Tensor before = allocate(kPropagateToNeighbors, "scratch memory", {rows, channels}, x, ScalarType::Float);
  const cuda::PropagationArguments<T> arguments = {
      cuda::input_data<T>(x), cuda::result_data<T>(y), cuda::result_data<float>(before), rows, channels, x.stride(0)};
  const int64_t blocks = ceil_div(channels, cuda::kPropagationThreads);
  cuda::launch<cuda::propagate_to_neighbors<T>>({blocks, cuda::kPropagationThreads, stream}, arguments);
  cuda::check_launches();
}

Tensor propagate_to_neighbors(const Tensor& input) {
  const Tensor x = check_propagation(input);
  const cuda::Device device(x);
  Tensor y = allocate(kPropagateToNeighbors, "the result", {x.size(0), x.size(1)}, x);
  if (y.numel() == 0) return y;
  with_element(kPropagateToNeighbors, {"x", x}, [&](auto element) { run<decltype(element)>(x, y, device.stream); });
  return y;
}

}  // namespace

LLAVA_ST_CUDA_KERNELS(m) { m.impl("propagate_to_neighbors", TORCH_BOX(&propagate_to_neighbors)); }

}  // namespace llava_st
