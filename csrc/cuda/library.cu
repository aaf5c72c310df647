// What the CUDA library says of itself, for the backend predicate and `python -m llava_st_ops.info`.
#include <cuda_runtime_api.h>

#define LLAVA_ST_EXPORT extern "C" __attribute__((visibility("default")))

/// The CUDA version that the library was built with, as in CUDART_VERSION: 13000 is 13.0.
LLAVA_ST_EXPORT int llava_st_cuda_runtime_version() { return CUDART_VERSION; }

/// The architectures inside, in CMake's terms: `80-real,90a-real,80-virtual`.
LLAVA_ST_EXPORT const char* llava_st_cuda_architectures() { return LLAVA_ST_CUDA_ARCHITECTURES; }
