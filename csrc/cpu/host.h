// How CPU launchers reach torch: its threads, its dtypes, memory for results.
#pragma once

#include "../checks.h"
#include "huge_pages.h"
#include "parallel_loop.h"

namespace llava_st::cpu {

inline ParallelLoop torch_loop() {
  const auto run = [](int64_t n, LoopBody body, void* context) {
    torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(begin, end, context); });
  };
  return {run, torch::stable::get_num_threads()};
}

inline Element element_of(const char* op, Argument argument) {
  switch (argument.tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::Double:
      return kDouble;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      fail(op, ": ", argument.name, " must be float64, float32, bfloat16 or float16, got ",
           to_text(argument.tensor.scalar_type()));
  }
}

/// Memory that is written once and whole.
inline Tensor allocate_result(const char* op, const char* name, const std::vector<int64_t>& sizes, const Tensor& like,
                              std::optional<ScalarType> dtype = std::nullopt) {
  Tensor result = allocate(op, name, sizes, like, dtype);
  advise_huge_pages(result.mutable_data_ptr(), result.numel() * static_cast<int64_t>(result.element_size()));
  return result;
}

/// The dtype that elements of a dtype are computed in.
inline ScalarType computing_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// The tensor in another dtype, contiguous; itself where it is so already.
inline Tensor contiguous_in(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

}  // namespace llava_st::cpu
