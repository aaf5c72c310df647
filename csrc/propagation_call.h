// What a call of propagate_to_neighbors must fulfil, for the CPU and the CUDA library.
#pragma once

#include "checks.h"

namespace llava_st {

constexpr auto kPropagateToNeighbors = "propagate_to_neighbors";

/// A matrix with contiguous rows.
inline Tensor check_propagation(const Tensor& x) {
  check_rank(kPropagateToNeighbors, {"x", x}, 2, "[anchors, C]");
  return with_contiguous_rows(x);
}

}  // namespace llava_st
