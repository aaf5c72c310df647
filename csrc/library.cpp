// Declares the ops; the CPU and the CUDA library register their kernels beside this.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(llava_st, m) {
  const char* const schemas[] = {
#include "schemas.txt"
  };
  for (const char* schema : schemas) m.def(schema);
}
