// A program without Python: loads a package that torch compiled ahead of time, and the library with the operators.
//
//   aot_program model.pt2 _cpu.abi3.so output
//
// The input is the sine of 0, 1, 2, ... as (9, 3, 3), with lengths 9, 0 and 4. The results go to `output`, one after
// the other, as float32.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <string>

#include <ATen/ATen.h>

namespace {

bool python_is_loaded() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("libpython") != std::string::npos || line.find("libtorch_python") != std::string::npos) return true;
  }
  return false;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "expected three arguments: the package, the library, the file for the results\n";
    return 2;
  }
  if (dlopen(arguments[2], RTLD_NOW) == nullptr) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader package(arguments[1]);
  const at::Tensor input = at::sin(at::arange(81, at::kFloat)).reshape({9, 3, 3});
  const at::Tensor lengths = at::tensor(at::ArrayRef<int64_t>({9, 0, 4}), at::kLong);
  std::ofstream file(arguments[3], std::ios::binary);
  for (const at::Tensor& result : package.run({input, lengths})) {
    const at::Tensor values = result.contiguous();
    file.write(static_cast<const char*>(values.const_data_ptr()), static_cast<std::streamsize>(values.nbytes()));
  }
  std::cout << (python_is_loaded() ? "with Python" : "without Python") << "\n";
  return 0;
}
