// Whether torch allows TF32 in float32 products on a GPU: torch.get_float32_matmul_precision() and its relatives.
#pragma once

#include <dlfcn.h>

namespace fusedreg::stable {

// Asked at each call, as torch's own products ask, so that the kernels' products follow the same setting. The stable
// ABI has no such question yet, so Context::float32Precision of at::globalContext() is looked up among the symbols of
// the torch that is loaded: torch's own products ask it too, and the older allowTF32CuBLAS throws where a program has
// used torch.backends.cuda.matmul.fp32_precision. A torch that has neither gets true float32, which is always right.
inline bool allows_tf32() {
  using GlobalContext = void* (*)();
  using Precision = int (*)(const void*, int backend, int operation);
  using AllowsTf32 = bool (*)(const void*);
  // In the order of torch's enumerations.
  constexpr int kCuda = 1, kMatmul = 3, kTf32 = 2;
  static const auto context = reinterpret_cast<GlobalContext>(dlsym(RTLD_DEFAULT, "_ZN2at13globalContextEv"));
  static const auto precision = reinterpret_cast<Precision>(
      dlsym(RTLD_DEFAULT, "_ZNK2at7Context16float32PrecisionENS_14Float32BackendENS_9Float32OpE"));
  static const auto allows = reinterpret_cast<AllowsTf32>(dlsym(RTLD_DEFAULT, "_ZNK2at7Context15allowTF32CuBLASEv"));
  if (context == nullptr) return false;
  if (precision != nullptr) return precision(context(), kCuda, kMatmul) == kTf32;
  return allows != nullptr && allows(context());
}

}  // namespace fusedreg::stable
