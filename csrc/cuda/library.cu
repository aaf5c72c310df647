// What the CUDA library says of itself, for the backend predicate and `python -m llava_st_ops.info`.
#include <cuda_runtime_api.h>

#define LLAVA_ST_EXPORT extern "C" __attribute__((visibility("default")))

/// The CUDA version that the library was built with, as in CUDART_VERSION: 13000 is 13.0.
LLAVA_ST_EXPORT int llava_st_cuda_runtime_version() { return CUDART_VERSION; }

/// The architectures inside, in CMake's terms: `80-real,90a-real,80-virtual`.
LLAVA_ST_EXPORT const char* llava_st_cuda_architectures() { return LLAVA_ST_CUDA_ARCHITECTURES; }

/// The ops as this library has them, which the package compares with its own before it loads the file.
LLAVA_ST_EXPORT const char* const* llava_st_cuda_schemas() {
  static const char* const schemas[] = {
#include "../schemas.txt"
  };
  return schemas;
}

/// What was built of the products by CUTLASS (linear_lape_gelu/cutlass), which no GPU has run yet.
LLAVA_ST_EXPORT const char* llava_st_cutlass() {
#if defined(LLAVA_ST_CUTLASS_SM80) && defined(LLAVA_ST_CUTLASS_SM90)
#define LLAVA_ST_CUTLASS_BUILT "sm_80 and sm_90a"
#elif defined(LLAVA_ST_CUTLASS_SM80)
#define LLAVA_ST_CUTLASS_BUILT "sm_80"
#elif defined(LLAVA_ST_CUTLASS_SM90)
#define LLAVA_ST_CUTLASS_BUILT "sm_90a"
#endif
#if defined(LLAVA_ST_CUTLASS_BUILT)
  return "built for " LLAVA_ST_CUTLASS_BUILT ", off by default (LLAVA_ST_CUTLASS=1 turns it on), never executed";
#else
  return "not built: " LLAVA_ST_CUTLASS_MISSING;
#endif
}
