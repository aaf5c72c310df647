// Input checks shared by the CPU and the CUDA library. An error names the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace llava_st {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Throws std::runtime_error (a RuntimeError in Python) made of the given parts.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

// A macro, so that the parts of a message are only put together when the check fails.
#define LLAVA_ST_CHECK(condition, ...) \
  if (!(condition)) {                  \
    ::llava_st::fail(__VA_ARGS__);     \
  }

template <class Sequence>
std::string to_text(const Sequence& numbers) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < numbers.size(); ++i) {
    text << (i ? ", " : "") << numbers[i];
  }
  text << ']';
  return text.str();
}

inline std::string to_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "scalar type number " + std::to_string(static_cast<int>(dtype));
  }
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device:") + std::to_string(tensor.get_device_index());
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

/// A tensor with its name, as it appears in error messages.
struct Argument {
  const char* name;
  const Tensor& tensor;
};

inline void check_rank(const char* op, Argument argument, int64_t rank, const char* layout) {
  LLAVA_ST_CHECK(argument.tensor.dim() == rank, op, ": ", argument.name, " must have ", rank, " dimensions ", layout,
                 ", got ", argument.tensor.dim(), " with shape ", to_text(argument.tensor.sizes()));
}

inline void check_same_kind(const char* op, Argument argument, Argument model) {
  LLAVA_ST_CHECK(argument.tensor.scalar_type() == model.tensor.scalar_type(), op, ": ", argument.name,
                 " must have the dtype of ", model.name, ", ", to_text(model.tensor.scalar_type()), ", got ",
                 to_text(argument.tensor.scalar_type()));
  LLAVA_ST_CHECK(same_device(argument.tensor, model.tensor), op, ": ", argument.name, " must be on the device of ",
                 model.name, ", ", device_text(model.tensor), ", got ", device_text(argument.tensor));
}

inline void check_shape(const char* op, Argument argument, const std::vector<int64_t>& expected) {
  const auto sizes = argument.tensor.sizes();
  bool equal = sizes.size() == expected.size();
  for (size_t i = 0; equal && i < expected.size(); ++i) equal = sizes[i] == expected[i];
  LLAVA_ST_CHECK(equal, op, ": ", argument.name, " must have shape ", to_text(expected), ", got ", to_text(sizes));
}

/// That no two entries share memory, as those of expanded tensors do: what is written in place must have its own.
inline void check_no_overlap(const char* op, Argument argument) {
  for (int64_t dim = 0; dim < argument.tensor.dim(); ++dim) {
    LLAVA_ST_CHECK(argument.tensor.size(dim) <= 1 || argument.tensor.stride(dim) != 0, op, ": ", argument.name,
                   " must have memory for every entry, got an expanded tensor with strides ",
                   to_text(argument.tensor.strides()));
  }
}

/// Allocates like `torch.empty`. What went wrong in an allocation is lost at the C boundary of the stable ABI, so the
/// error says it again; the Python functions turn it into torch.OutOfMemoryError.
inline Tensor allocate(const char* op, const char* name, const std::vector<int64_t>& sizes, const Tensor& like,
                       std::optional<ScalarType> dtype = std::nullopt) {
  try {
    return torch::stable::new_empty(like, sizes, dtype);
  } catch (const std::exception& error) {
    fail(op, ": out of memory allocating ", name, " of shape ", to_text(sizes), " and dtype ",
         to_text(dtype.value_or(like.scalar_type())), " on ", device_text(like),
         " (or an earlier error of the device: ", error.what(), ")");
  }
}

/// The tensor itself where its last dimension is contiguous, else a copy that is: kernels read whole rows.
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace llava_st
