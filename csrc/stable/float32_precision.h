// Whether torch allows TF32 in float32 products on a GPU: torch.get_float32_matmul_precision() and its relatives.
#pragma once

#include <dlfcn.h>

namespace fusedreg::stable {

// Asked at each call, as torch's own products ask, so that the kernels' products follow the same setting. The stable
// ABI has no such question yet, so at::globalContext().allowTF32CuBLAS() is looked up among the symbols of the torch
// that is loaded. A torch that has renamed it gets true float32, which is always right.
inline bool allows_tf32() {
  using GlobalContext = void* (*)();
  using AllowsTf32 = bool (*)(const void*);
  static const auto context = reinterpret_cast<GlobalContext>(dlsym(RTLD_DEFAULT, "_ZN2at13globalContextEv"));
  static const auto allows = reinterpret_cast<AllowsTf32>(dlsym(RTLD_DEFAULT, "_ZNK2at7Context15allowTF32CuBLASEv"));
  return context != nullptr && allows != nullptr && allows(context());
}

}  // namespace fusedreg::stable
