// The Python module `emulated_kernels`: settings of the emulator, the zoo, and parts of the kernels that have tests of
// their own. The ops come with the launchers (csrc/cuda/**/*.cu), which are linked in and register themselves.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "cuda/point_to_region_attention/dispatch.h"
#include "zoo.cuh"

namespace py = pybind11;

namespace {

using namespace llava_st;
using namespace llava_st::cuda;

using Sizes = std::array<int64_t, 3>;

template <auto kernel>
std::vector<float> run_zoo(const std::vector<float>& numbers, int64_t blocks) {
  if (numbers.size() != zoo::kInputs)
    throw py::value_error("the zoo takes " + std::to_string(zoo::kInputs) + " numbers");
  emulator::forget_memory();
  struct alignas(64) Line {
    float numbers[16];
  };
  const auto allocate = [](size_t count) { return std::vector<Line>((count + 15) / 16); };
  std::vector<Line> input = allocate(zoo::kInputs), result = allocate(zoo::kResults);
  std::copy(numbers.begin(), numbers.end(), reinterpret_cast<float*>(input.data()));
  const auto* const from = reinterpret_cast<const float*>(input.data());
  auto* const to = reinterpret_cast<float*>(result.data());
  emulator::allow_reading(from, zoo::kInputs * sizeof(float));
  emulator::allow_writing(to, zoo::kResults * sizeof(float));
  const float zero = 0.0f;
  emulator::copy_to_device(to + zoo::kThreads, &zero, sizeof(zero));  // what threads add to
  launch<kernel>({blocks, zoo::kThreads, nullptr}, from, to);
  return {to, to + zoo::kResults};
}

/// The kernel that a problem would run, as "elements lanes vectors steps many", extended or not.
template <class T>
std::string layout_text(const RowShape& rows, int64_t keys) {
  std::string text;
  with_layout<T>(rows, keys, [&](auto layout) {
    using L = decltype(layout);
    for (const int number : {L::ELEMENTS, L::LANES, L::VECTORS, L::STEPS}) text += std::to_string(number) + ' ';
    text += L::MANY ? "many" : "few";
    text += L::EXTENDED ? " extended" : "";
  });
  return text;
}

std::string layout(const std::string& dtype, int head_dim, bool vectors, int64_t keys, int value_dim, bool biased) {
  const RowShape rows = {head_dim, value_dim, vectors, biased};
  return dtype == "torch.float32" ? layout_text<float>(rows, keys) : layout_text<BFloat16>(rows, keys);
}

std::vector<int64_t> quotients(int64_t divisor, const std::vector<int64_t>& numbers) {
  const Divisor by(divisor);
  std::vector<int64_t> results;
  for (const int64_t number : numbers) results.push_back(by.quotient(number));
  return results;
}

/// The places of tokens number `numbers` in a region.
std::vector<Sizes> places(Sizes size, const std::vector<int64_t>& numbers) {
  const Places of({size[0], size[1], size[2]});
  std::vector<Sizes> results;
  for (const int64_t number : numbers) {
    const Place place = of.at<false>(number);
    results.push_back({place.t, place.h, place.w});
  }
  return results;
}

}  // namespace

PYBIND11_MODULE(emulated_kernels, module) {
  py::register_exception<emulator::KernelError>(module, "KernelError", PyExc_RuntimeError);
  using emulator::Settings;
  py::class_<Settings>(module, "Settings")
      .def_readwrite("seed", &Settings::seed)
      .def_readwrite("max_blocks", &Settings::max_blocks)
      .def_readwrite("tensors_on_device", &Settings::tensors_on_device);
  module.attr("settings") = py::cast(&emulator::settings(), py::return_value_policy::reference);
  module.def("launches", [] { return emulator::launches(); });

  py::dict wrong, right;
  zoo::visit_zoo([&]<auto wrong_kernel, auto right_kernel>(const char* name, int64_t blocks) {
    wrong[name] = py::cpp_function([=](const std::vector<float>& in) { return run_zoo<wrong_kernel>(in, blocks); });
    right[name] = py::cpp_function([=](const std::vector<float>& in) { return run_zoo<right_kernel>(in, blocks); });
  });
  module.attr("wrong") = wrong;
  module.attr("right") = right;

  module.def("layout", &layout);
  module.def("quotients", &quotients);
  module.def("places", &places);
}
