// What host code asks of the CUDA runtime, in plain C++: includable without nvcc, and implemented twice, by runtime.cu
// over the CUDA runtime and by emulation/runtime.cpp over the emulator. Failures throw std::runtime_error.
#pragma once

#include <cstddef>

namespace fusedreg::cuda {

// How a kernel is launched. A cooperative grid is resident as a whole, so that its blocks may wait for one another;
// blocks of a cluster (along x) are resident together and see each other's shared memory.
struct Launch {
  int grid_x = 1, grid_y = 1;
  int threads = 256;
  size_t shared_bytes = 0;
  bool cooperative = false;
  int cluster = 1;
  void* stream = nullptr;
};

// What decides which kernel fits the current device.
struct DeviceLimits {
  int multiprocessors = 0;
  int shared_bytes_per_block = 0;  // the most a kernel may ask for, not the 48 KiB it gets without asking
  int major = 0, minor = 0;        // compute capability
};

DeviceLimits device_limits();

#if !defined(FUSEDREG_CUDA_EMULATION)
// As CUDA counts: 1000 times the major version plus 10 times the minor. The driver's: what it can run; 0 without one.
struct CudaVersions {
  int driver = 0, runtime = 0;
};
CudaVersions cuda_versions();  // needs no device
#endif

void clear_async(void* memory, size_t bytes, void* stream);
void copy_async(void* to, const void* from, size_t bytes, void* stream);

// What the templates of device.h call: `kernel` is the function's address, `name` what its template is called.
void launch_kernel(const void* kernel, const char* name, const Launch& launch, void* params);
int resident_clusters_of(const void* kernel, const char* name, int threads, size_t shared_bytes, int cluster);

}  // namespace fusedreg::cuda
