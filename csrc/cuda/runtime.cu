// runtime.h over the CUDA runtime. Every return code becomes an exception that names the call and the kernel.
#if defined(__CUDACC__)

#include "runtime.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fusedreg::cuda {
namespace {

void check(cudaError_t code, const std::string& what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here; it must not be found again by whoever asks next
  throw std::runtime_error("CUDA: " + what + ": " + cudaGetErrorName(code) + ": " + cudaGetErrorString(code));
}

// "... [with auto kernel = name<...>; Params = ...]" holds the kernel's name; compilers word the rest differently.
std::string kernel_name(const char* pretty) {
  const std::string text = pretty;
  const size_t start = text.find("kernel = ");
  if (start == std::string::npos) return text;
  const size_t end = text.find_first_of(";]", start);
  return text.substr(start + 9, end == std::string::npos ? end : end - start - 9);
}

int attribute(cudaDeviceAttr which, const char* what) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&value, which, device), what);
  return value;
}

// To the most that a block can have, and not to what this launch needs: threads that launch one kernel with other
// shapes must not lower each other's limit between here and the launch.
void raise_limits(const void* kernel, const std::string& name, size_t shared_bytes, int cluster) {
  const size_t without_asking = 48 * 1024, portable_cluster = 8;
  if (shared_bytes > without_asking) {
    const int most =
        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "asking for the shared memory a block can have");
    if (shared_bytes > static_cast<size_t>(most)) {
      throw std::runtime_error("CUDA: " + name + ": a block needs " + std::to_string(shared_bytes) +
                               " bytes of shared memory, and this device has " + std::to_string(most) +
                               " of them. Choose another tier.");
    }
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
          name + ": asking for " + std::to_string(most) + " bytes of shared memory a block");
  }
  if (cluster > static_cast<int>(portable_cluster)) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          name + ": asking for clusters of more than 8 blocks");
  }
}

cudaLaunchAttribute cluster_size(int blocks) {
  cudaLaunchAttribute size = {};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = static_cast<unsigned>(blocks);
  size.val.clusterDim.y = 1;
  size.val.clusterDim.z = 1;
  return size;
}

void check_resident(const void* kernel, const std::string& name, const Launch& launch) {
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, launch.threads, launch.shared_bytes),
        name + ": asking how many blocks are resident");
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, "asking for the number of multiprocessors");
  const long long asked = static_cast<long long>(launch.grid_x) * launch.grid_y;
  const long long resident = static_cast<long long>(blocks) * multiprocessors;
  if (asked > resident) {
    throw std::runtime_error("CUDA: " + name + ": a cooperative grid of " + std::to_string(asked) + " blocks of " +
                             std::to_string(launch.threads) + " threads and " + std::to_string(launch.shared_bytes) +
                             " bytes of shared memory cannot be resident as a whole: this device holds " +
                             std::to_string(resident) + " of them. Choose another tier.");
  }
}

}  // namespace

DeviceLimits device_limits() {
  DeviceLimits limits;
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, "asking for the number of multiprocessors");
  limits.shared_bytes_per_block =
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "asking for the shared memory a block can have");
  limits.major = attribute(cudaDevAttrComputeCapabilityMajor, "asking for the compute capability");
  limits.minor = attribute(cudaDevAttrComputeCapabilityMinor, "asking for the compute capability");
  return limits;
}

CudaVersions cuda_versions() {
  CudaVersions versions;
  check(cudaDriverGetVersion(&versions.driver), "asking for the driver's version");
  check(cudaRuntimeGetVersion(&versions.runtime), "asking for the runtime's version");
  return versions;
}

void clear_async(void* memory, size_t bytes, void* stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "clearing memory");
}

void copy_async(void* to, const void* from, size_t bytes, void* stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)),
        "copying memory");
}

void launch_kernel(const void* kernel, const char* pretty, const Launch& launch, void* params) {
  const std::string name = kernel_name(pretty);
  raise_limits(kernel, name, launch.shared_bytes, launch.cluster);
  if (launch.cooperative) check_resident(kernel, name, launch);

  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (launch.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (launch.cluster > 1) attributes[count++] = cluster_size(launch.cluster);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(launch.grid_x), static_cast<unsigned>(launch.grid_y));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = attributes;
  config.numAttrs = count;
  void* arguments[] = {params};
  check(cudaLaunchKernelExC(&config, kernel, arguments), name + ": launching it");
}

// Asked of every size, however small: a slice of a device may have too few multiprocessors side by side, and sizes that
// are no power of two need not be there.
int resident_clusters_of(const void* kernel, const char* pretty, int threads, size_t shared_bytes, int cluster) {
  if (attribute(cudaDevAttrClusterLaunch, "asking for clusters") == 0) return 0;
  const std::string name = kernel_name(pretty);
  raise_limits(kernel, name, shared_bytes, cluster);
  cudaLaunchAttribute size = cluster_size(cluster);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &size;
  config.numAttrs = 1;
  int clusters = 0;
  const cudaError_t answer = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  // The ways to say that no such cluster can be had; anything else is a failure of something before.
  for (const cudaError_t refusal : {cudaErrorInvalidClusterSize, cudaErrorInvalidConfiguration, cudaErrorInvalidValue,
                                    cudaErrorLaunchOutOfResources, cudaErrorNotSupported}) {
    if (answer != refusal) continue;
    cudaGetLastError();
    return 0;
  }
  check(answer, name + ": asking how many clusters of " + std::to_string(cluster) + " blocks are resident");
  return clusters;
}

}  // namespace fusedreg::cuda

#endif
