// Runs a compiled visual tokenizer, or packer, on the features of a clip, with LibTorch and no Python.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// The library registers its ops with LibTorch as it is loaded; there is nothing in it to call.
void load_ops(const std::string& library) {
  if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
}

at::Tensor read_tensor(const std::string& path) {  // as torch.save writes one
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::jit::pickle_load(bytes).toTensor();
}

void write_tensors(const std::string& path, const std::vector<at::Tensor>& tensors) {
  // As a tuple: torch.load refuses a list of tensors from C++ unless it is told to trust the file.
  const std::vector<c10::IValue> values(tensors.begin(), tensors.end());
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(values));
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    throw std::runtime_error("cannot write " + path);
  }
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 5) {
    std::cerr << "usage: " << argv[0] << " libllava_st_cpu.so PACKAGE.pt2 FEATURES.pt TOKENS.pt\n";
    return 2;
  }
  // Without it the compiled code trusts whatever size it is given.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", /*overwrite=*/0);
  load_ops(argv[1]);
  torch::inductor::AOTIModelPackageLoader tokenizer(argv[2]);
  const std::vector<at::Tensor> tokens = tokenizer.run({read_tensor(argv[3])});
  for (const at::Tensor& stream : tokens) std::cout << stream.sizes() << '\n';
  write_tensors(argv[4], tokens);
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
