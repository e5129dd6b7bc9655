// runtime.h over the emulator.
#include "../runtime.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

#include "machine.h"
#include "recording.h"

namespace fusedreg::cuda {
namespace emulation {
namespace {

constexpr int kMostClusterBlocks = 16;

struct Device {
  std::mutex one_launch;
  DeviceLimits limits{132, 227 * 1024, 9, 0};
  uint64_t schedule = 0, launches = 0;
};

Device& device() {
  static Device the_device;
  return the_device;
}

// "... [with auto kernel = name<...>; Params = ...]"
std::string kernel_name(const std::string& pretty) {
  const size_t start = pretty.find("kernel = ");
  if (start == std::string::npos) return pretty;
  const size_t end = pretty.find_first_of(";]", start);
  return pretty.substr(start + 9, end == std::string::npos ? end : end - start - 9);
}

// Why a launch is refused, or nothing.
std::string objection(const Launch& launch, const DeviceLimits& limits) {
  if (launch.threads < kLanes || launch.threads > 1024 || launch.threads % kLanes != 0) {
    return "a block has 32 to 1024 threads, whole warps of them, got " + std::to_string(launch.threads);
  }
  if (launch.grid_x < 1 || launch.grid_y < 1) return "the grid has no blocks";
  if (launch.shared_bytes > static_cast<size_t>(limits.shared_bytes_per_block)) {
    return "asks for " + std::to_string(launch.shared_bytes) + " bytes of shared memory a block, the device has " +
           std::to_string(limits.shared_bytes_per_block);
  }
  // A multiprocessor is taken to hold one block: what persistent kernels count on, given the registers they use.
  if (launch.cooperative && launch.grid_x * launch.grid_y > limits.multiprocessors) {
    return "a cooperative grid of " + std::to_string(launch.grid_x * launch.grid_y) +
           " blocks cannot be resident as a whole on " + std::to_string(limits.multiprocessors) + " multiprocessors";
  }
  if (launch.cluster > 1 && limits.major < 9) return "clusters need compute capability 9.0";
  if (launch.cluster > kMostClusterBlocks || (launch.cluster > 1 && launch.cluster > limits.multiprocessors)) {
    return "a cluster of " + std::to_string(launch.cluster) + " blocks";
  }
  if (launch.cluster > 1 && launch.grid_x % launch.cluster != 0) return "the grid is no multiple of the cluster";
  return "";
}

void run_kernel(const Kernel& kernel, const char* pretty, const Launch& launch, const char* params) {
  Device& the_device = device();
  const std::lock_guard<std::mutex> lock(the_device.one_launch);
  const auto check = [&](const std::string& failure) {
    if (failure.empty()) return;
    throw std::runtime_error("CUDA emulation: " + kernel_name(pretty) + ": " + failure);
  };
  check(objection(launch, the_device.limits));

  Random random;
  random.seed(the_device.schedule * 1'000'003 + the_device.launches++);
  std::vector<std::pair<int, int>> places;
  for (int y = 0; y < launch.grid_y; ++y) {
    for (int x = 0; x < launch.grid_x; ++x) places.emplace_back(x, y);
  }
  // Alive together is what must be: all of a cooperative grid, else a cluster at a time, in any order.
  const size_t together = launch.cooperative ? places.size() : static_cast<size_t>(std::max(1, launch.cluster));
  std::vector<size_t> order(places.size() / together);
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t left = order.size(); left > 1; --left) {
    std::swap(order[left - 1], order[random.below(static_cast<uint32_t>(left))]);
  }
  for (const size_t group : order) {
    const auto first = places.begin() + static_cast<std::ptrdiff_t>(group * together);
    const auto last = first + static_cast<std::ptrdiff_t>(together);
    check(run_blocks(launch, kernel, params, {first, last}, random.next()));
  }
}

}  // namespace

void set_limits(const DeviceLimits& limits) { device().limits = limits; }

void set_schedule(uint64_t seed) {
  device().schedule = seed;
  device().launches = 0;
}

}  // namespace emulation

void launch_kernel(const void* address, const char* pretty, const Launch& launch, void* params) {
  const auto* const kernel = static_cast<const emulation::Kernel*>(address);
  const auto* const bytes = static_cast<const char*>(params);
  const std::vector<char> copy(bytes, bytes + kernel->parameter_bytes);
  emulation::perform([=] { emulation::run_kernel(*kernel, pretty, launch, copy.data()); });
}

int resident_clusters_of(const void*, const char*, int, size_t shared_bytes, int cluster) {
  const DeviceLimits limits = device_limits();
  const bool fits = shared_bytes <= static_cast<size_t>(limits.shared_bytes_per_block);
  return limits.major < 9 || !fits || cluster > emulation::kMostClusterBlocks ? 0 : limits.multiprocessors / cluster;
}

DeviceLimits device_limits() { return emulation::device().limits; }
void clear_async(void* memory, size_t bytes, void*) {
  emulation::perform([=] { std::memset(memory, 0, bytes); });
}
void copy_async(void* to, const void* from, size_t bytes, void*) {
  emulation::perform([=] { std::memmove(to, from, bytes); });
}

}  // namespace fusedreg::cuda
