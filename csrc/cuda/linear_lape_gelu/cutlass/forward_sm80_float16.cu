// An instantiation by itself, so that the build runs in parallel.
#include "sm80.cuh"

const char* llava_st::cuda::multiply_sm80(const ForwardProduct<Float16>& product, void* stream) {
  return forward_sm80(product, stream);
}
