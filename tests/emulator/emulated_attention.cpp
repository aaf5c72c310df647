// Binds the emulated kernels of point-to-region attention to Python: tensors come as objects, only their pointers,
// sizes and strides are read.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/point_to_region_attention/dispatch.h"

namespace py = pybind11;

namespace {

using namespace llava_st;
using namespace llava_st::cuda;

using Sizes = std::array<int64_t, 3>;

/// How kernels are run: the order of threads, and the most blocks that a launch may have.
struct Run {
  uint64_t seed = 0;
  int64_t max_blocks = kMaxBlocks;
};

struct View {
  void* data;
  std::vector<int64_t> sizes, strides;
  std::string dtype;

  explicit View(py::handle tensor)
      : data(reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>())),
        sizes(tensor.attr("shape").cast<std::vector<int64_t>>()),
        strides(tensor.attr("stride")().cast<std::vector<int64_t>>()),
        dtype(py::str(tensor.attr("dtype"))) {}

  bool packed() const { return sizes.size() == 3; }

  template <class T>
  Operand<T> operand() const {
    return {static_cast<T*>(data), strides_that_count(sizes.data(), strides.data(), packed())};
  }
};

Extent extent(const Sizes& sizes) { return {sizes[0], sizes[1], sizes[2]}; }

/// A problem with the scratch memory that a packed one lives in.
struct Problem {
  std::vector<int64_t> scratch;
  AttentionProblem attention;

  Problem(const View& query, const View& key, py::object grid_thw, const Sizes& region, double scale) {
    if (!key.packed()) {
      attention = dense_problem(key.sizes[0], {key.sizes[1], key.sizes[2], key.sizes[3]}, extent(region), key.sizes[4],
                                key.sizes[5], scale);
      return;
    }
    const View grids(grid_thw);
    const int64_t videos = grids.sizes[0];
    scratch.assign(packed_scratch_size(videos), std::numeric_limits<int64_t>::min());
    const int64_t keys = key.sizes[0];
    attention = packed_problem(query.sizes[0], keys, videos, {keys, keys, keys}, extent(region), key.sizes[1],
                               key.sizes[2], scale, scratch.data());
    if (grids.dtype == "torch.int64") {
      locate(attention, static_cast<const int64_t*>(grids.data), nullptr);
    } else {
      locate(attention, static_cast<const int32_t*>(grids.data), nullptr);
    }
  }
};

template <class Visit>
void with_element(const std::string& dtype, const Visit& visit) {
  if (dtype == "torch.float32") return visit(float{});
  if (dtype == "torch.float16") return visit(Float16{});
  if (dtype == "torch.bfloat16") return visit(BFloat16{});
  throw py::type_error("no kernel computes in " + dtype);
}

void forward(py::object query, py::object key, py::object value, py::object output, py::object grid_thw, Sizes region,
             double scale, const Run& run) {
  emulator::set_seed(run.seed);
  const View q(query), k(key), v(value), o(output);
  const Problem problem(q, k, grid_thw, region, scale);
  with_element(q.dtype, [&](auto element) {
    using T = decltype(element);
    const ForwardArguments<T> arguments = {problem.attention, q.operand<const T>(), k.operand<const T>(),
                                           v.operand<const T>(), static_cast<T*>(o.data)};
    launch_forward(arguments, nullptr, run.max_blocks);
  });
}

void backward(py::object grad_output, py::object query, py::object key, py::object value, py::object grad_query,
              py::object grad_key, py::object grad_value, py::object grid_thw, Sizes region, double scale,
              const Run& run) {
  emulator::set_seed(run.seed);
  const View g(grad_output), q(query), k(key), v(value), dq(grad_query), dk(grad_key), dv(grad_value);
  const Problem problem(q, k, grid_thw, region, scale);
  with_element(q.dtype, [&](auto element) {
    using T = decltype(element);
    const BackwardArguments<T> arguments = {problem.attention,    g.operand<const T>(), q.operand<const T>(),
                                            k.operand<const T>(), v.operand<const T>(), static_cast<T*>(dq.data),
                                            dk.operand<T>(),      dv.operand<T>()};
    launch_backward(arguments, nullptr, run.max_blocks);
  });
}

/// The kernel that a problem would run, as "elements lanes vectors steps many".
std::string layout_text(const std::string& dtype, int head_dim, bool vectors, int64_t keys) {
  std::string text;
  with_element(dtype, [&](auto element) {
    with_layout<decltype(element)>(head_dim, vectors, keys, [&](auto layout) {
      using L = decltype(layout);
      for (const int number : {L::ELEMENTS, L::LANES, L::VECTORS, L::STEPS}) text += std::to_string(number) + ' ';
      text += L::MANY ? "many" : "few";
    });
  });
  return text;
}

/// Quotients of a divisor, for its own test.
std::vector<int64_t> quotients(int64_t divisor, const std::vector<int64_t>& numbers) {
  const Divisor by(divisor);
  std::vector<int64_t> results;
  for (const int64_t number : numbers) results.push_back(by.quotient(number));
  return results;
}

/// The places of tokens number `numbers` in a region.
std::vector<Sizes> places(Sizes size, const std::vector<int64_t>& numbers) {
  const Places of(extent(size));
  std::vector<Sizes> results;
  for (const int64_t number : numbers) {
    const Place place = of.at<false>(number);
    results.push_back({place.t, place.h, place.w});
  }
  return results;
}

}  // namespace

void bind_wrong_kernels(py::module_& module);

PYBIND11_MODULE(emulated_kernels, module) {
  py::class_<Run>(module, "Run")
      .def(py::init([](uint64_t seed, int64_t max_blocks) { return Run{seed, max_blocks}; }), py::arg("seed") = 0,
           py::arg("max_blocks") = kMaxBlocks);
  module.def("forward", &forward);
  module.def("backward", &backward);
  module.def("layout", &layout_text);
  module.def("quotients", &quotients);
  module.def("places", &places);
  bind_wrong_kernels(module);
}
