// propagate_to_neighbors on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "../geometry/regions.h"
#include "../propagation_call.h"
#include "neighbor_kernel.h"

namespace llava_st {
namespace {

template <class T>
void run(const Tensor& x, Tensor& y) {
  using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t rows = x.size(0), channels = x.size(1), stride = x.stride(0);
  const T* const from = static_cast<const T*>(x.const_data_ptr());
  T* const to = static_cast<T*>(y.mutable_data_ptr());
  const int64_t tiles = ceil_div(channels, cpu::kChannels);
  const Tensor scratch = allocate(kPropagateToNeighbors, "scratch memory", {tiles * rows * cpu::kChannels}, x,
                                  std::is_same_v<S, double> ? ScalarType::Double : ScalarType::Float);
  S* const before = static_cast<S*>(const_cast<void*>(scratch.const_data_ptr()));
  torch::stable::parallel_for(0, tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * cpu::kChannels;
      cpu::propagate(from + first, stride, to + first, channels, rows, std::min(cpu::kChannels, channels - first),
                     before + tile * rows * cpu::kChannels);
    }
  });
}

Tensor propagate_to_neighbors(const Tensor& input) {
  const Tensor x = check_propagation(input);
  Tensor y = allocate(kPropagateToNeighbors, "the result", {x.size(0), x.size(1)}, x);
  if (y.numel() == 0) return y;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run<float>(x, y);
      break;
    case ScalarType::Double:
      run<double>(x, y);
      break;
    case ScalarType::BFloat16:
      run<c10::BFloat16>(x, y);
      break;
    case ScalarType::Half:
      run<c10::Half>(x, y);
      break;
    default:
      fail(kPropagateToNeighbors, ": x must be float64, float32, bfloat16 or float16, got ", to_text(x.scalar_type()));
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llava_st, CPU, m) { m.impl("propagate_to_neighbors", TORCH_BOX(&propagate_to_neighbors)); }

}  // namespace llava_st
