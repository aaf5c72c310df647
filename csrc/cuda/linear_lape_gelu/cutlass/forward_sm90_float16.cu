// An instantiation by itself, so that the build runs in parallel.
#include "sm90.cuh"

const char* llava_st::cuda::multiply_sm90(const ForwardProduct<Float16>& product, int multiprocessors, void* stream) {
  return forward_sm90(product, multiprocessors, stream);
}
