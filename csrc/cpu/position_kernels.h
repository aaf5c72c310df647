// All kernels of LAPE, the GELU behind it and the coordinate loss. Compiled once per instruction set.
#pragma once

#include "gelu_kernels.h"
#include "lape_add_kernels.h"
#include "lape_scatter_kernels.h"
#include "loss_kernels.h"

namespace llava_st::LLAVA_ST_ISA {

/// In the order of cpu::Element.
constexpr cpu::PositionKernels position_kernels() {
  return {{add<float>, add<double>, add<BFloat16>, add<Float16>},
          {add_backward<float>, add_backward<double>, add_backward<BFloat16>, add_backward<Float16>},
          {scatter<float>, scatter<double>, scatter<BFloat16>, scatter<Float16>},
          {gather<float>, gather<double>, gather<BFloat16>, gather<Float16>},
          {update_statistics<float>, update_statistics<double>},
          {logit_gradient<float>, logit_gradient<double>},
          {accumulate<float>, accumulate<double>},
          {position_gelu<float>, position_gelu<double>, position_gelu<BFloat16>, position_gelu<Float16>},
          {gelu_gradient<float>, gelu_gradient<double>, gelu_gradient<BFloat16>, gelu_gradient<Float16>}};
}

}  // namespace llava_st::LLAVA_ST_ISA
