// From a tensor's dtype to the type of its elements in kernels.
#pragma once

#include "host.h"

namespace llava_st {

/// Calls `visit` with an element of the tensor's dtype.
template <class Visit>
void with_element(const char* op, Argument argument, const Visit& visit) {
  switch (argument.tensor.scalar_type()) {
    case ScalarType::Float:
      return visit(float{});
    case ScalarType::BFloat16:
      return visit(cuda::BFloat16{});
    case ScalarType::Half:
      return visit(cuda::Float16{});
    default:
      fail(op, ": ", argument.name, " must be float32, bfloat16 or float16 on a CUDA device, got ",
           to_text(argument.tensor.scalar_type()));
  }
}

}  // namespace llava_st
