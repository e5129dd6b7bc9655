// Small kernels that show what the CUDA emulator promises: `emulator_driver CASE SEEDS` runs a case under that many
// schedules and prints, for each, "right", "wrong" or the error. Compiled with FUSEDREG_CUDA_EMULATION.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace fusedreg::cuda {

constexpr int kThreads = 64, kBlocks = 4, kSteps = 6;
constexpr uint64_t kLongestWait = 5'000'000'000;

struct Params {
  float* out = nullptr;
  float* buffer = nullptr;
  uint32_t* flags = nullptr;
};

// The neighbour's value of each step, through shared memory: without the first barrier it is read too early, without
// the second overwritten too early.
template <bool before, bool after>
FUSEDREG_KERNEL void neighbours(FUSEDREG_PARAMETER Params params) {
  float* const values = reinterpret_cast<float*>(dynamic_shared());
  float sum = 0;
  for (int step = 0; step < kSteps; ++step) {
    values[thread_index()] = static_cast<float>(step * 1000 + thread_index());
    if (before) sync_block();
    sum += values[(thread_index() + 7) % block_threads()];
    if (after) sync_block();
  }
  params.out[block_index() * kThreads + thread_index()] = sum;
}

float neighbours_expected(int index) { return static_cast<float>(kSteps * ((index + 7) % kThreads) + 15000); }

// The same in a warp.
template <bool synchronised>
FUSEDREG_KERNEL void lanes(FUSEDREG_PARAMETER Params params) {
  float* const values = reinterpret_cast<float*>(dynamic_shared());
  values[thread_index()] = static_cast<float>(15000 + kSteps * thread_index());
  if (synchronised) sync_warp();
  params.out[block_index() * kThreads + thread_index()] = values[warp_index() * 32 + (lane() + 7) % 32];
}

float lanes_expected(int index) { return static_cast<float>(15000 + kSteps * (index / 32 * 32 + (index + 7) % 32)); }

// A number from device memory, on its way while the thread goes on.
template <bool waited>
FUSEDREG_KERNEL void fetches(FUSEDREG_PARAMETER Params params) {
  uint32_t* const values = reinterpret_cast<uint32_t*>(dynamic_shared());
  fetch_to_shared(values + thread_index(), params.flags + block_index());
  if (waited) wait_for_fetched();
  sync_block();
  params.out[block_index() * kThreads + thread_index()] = static_cast<float>(values[(thread_index() + 7) % kThreads]);
}

float fetches_expected(int) { return 0; }

FUSEDREG_KERNEL void shuffles(FUSEDREG_PARAMETER Params params) {
  const int own = thread_index() * 3;
  const uint32_t a = shuffle_xor(static_cast<uint32_t>(own), 5);
  const int b = shuffle(own, 31 - lane());
  const float c = shuffle_xor(static_cast<float>(own), 16);
  const double d = shuffle(static_cast<double>(own) + 0.5, 3);
  params.out[block_index() * kThreads + thread_index()] =
      static_cast<float>(a) + static_cast<float>(b) + c + static_cast<float>(d);
}

float shuffles_expected(int index) {
  const int warp = index / 32 * 32, lane = index % 32;
  return 3.0f * static_cast<float>(4 * warp + (lane ^ 5) + (31 - lane) + (lane ^ 16) + 3) + 0.5f;
}

// One thing for every block to read: each block gives a number a step, and adds up what all gave. Double-buffered.
template <bool release, bool acquire, bool barrier, bool hand_over>
FUSEDREG_KERNEL void exchange(FUSEDREG_PARAMETER Params params) {
  float sum = 0;
  for (int step = 1; step <= kSteps; ++step) {
    float* const buffer = params.buffer + step % 2 * kBlocks * kThreads;
    store_exchanged(buffer + block_index() * kThreads + thread_index(), static_cast<float>(step));
    if (barrier) sync_block();
    if (thread_index() == 0) {
      uint32_t* const flag = params.flags + block_index();
      release ? store_release(flag, step) : store_relaxed(flag, step);
    }
    const uint64_t begin = timer_nanoseconds();
    for (int block = lane(); block < grid_blocks(); block += 32) {
      const auto look = [&] {
        return acquire ? load_acquire(params.flags + block) : load_relaxed(params.flags + block);
      };
      while (look() < static_cast<uint32_t>(step)) {
        if (timer_nanoseconds() - begin > kLongestWait) stop("5 seconds passed: block, step", block, step);
      }
    }
    if (hand_over) sync_warp();
    for (int block = 0; block < grid_blocks(); ++block)
      sum += load_exchanged(buffer + block * kThreads + thread_index());
    sync_block();
  }
  params.out[block_index() * kThreads + thread_index()] = sum;
}

float exchange_expected(int) { return kBlocks * kSteps * (kSteps + 1) / 2; }

// A block that never raises its flag.
FUSEDREG_KERNEL void never(FUSEDREG_PARAMETER Params params) {
  const uint64_t begin = timer_nanoseconds();
  while (load_acquire(params.flags + 3) == 0) {
    if (timer_nanoseconds() - begin > kLongestWait) stop("5 seconds passed: block, step", 3, 1);
  }
}

FUSEDREG_KERNEL void never_unbounded(FUSEDREG_PARAMETER Params params) {
  while (load_acquire(params.flags + 3) == 0) {
  }
}

// Every block of the cluster gives its number to all.
template <bool barrier, bool leave_together>
FUSEDREG_KERNEL void cluster_sum(FUSEDREG_PARAMETER Params params) {
  float* const values = reinterpret_cast<float*>(dynamic_shared());
  if (thread_index() < cluster_blocks()) {
    store_to_block(values + cluster_rank(), thread_index(), static_cast<float>(1 + cluster_rank()));
  }
  if (barrier) {
    cluster_arrive();
    cluster_wait();
  } else {
    sync_block();
  }
  float sum = 0;
  for (int block = 0; block < cluster_blocks(); ++block) sum += values[block];
  sum += load_from_block(values, 1);
  if (leave_together) {
    cluster_arrive();
    cluster_wait();
  }
  params.out[block_index() * kThreads + thread_index()] = sum;
}

float cluster_expected(int) { return 1 + 2 + 3 + 4 + 1; }

FUSEDREG_KERNEL void arrives_twice(FUSEDREG_PARAMETER Params) {
  cluster_arrive();
  cluster_arrive();
}

FUSEDREG_KERNEL void one_stays_away(FUSEDREG_PARAMETER Params) {
  if (thread_index() != 5) sync_block();
}

FUSEDREG_KERNEL void diverging_warp(FUSEDREG_PARAMETER Params params) {
  params.out[thread_index()] = lane() < 16 ? shuffle_xor(1.0f, 1) : shuffle(1.0f, 0);
}

FUSEDREG_KERNEL void writes_outside(FUSEDREG_PARAMETER Params) { dynamic_shared()[4096 + thread_index()] = 0; }

// The order in which the threads came.
FUSEDREG_KERNEL void order(FUSEDREG_PARAMETER Params params) {
  params.flags[0] += 1;
  params.out[block_index() * kThreads + thread_index()] = static_cast<float>(params.flags[0]);
}

// A (16, k) times B (k, 8), of small integers, which every type holds exactly, plus C.
int a_value(int row, int k) { return (row * 7 + k * 3) % 11 - 5; }
int b_value(int k, int column) { return (k * 5 + column * 2) % 9 - 4; }

uint32_t bits(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}

template <class Storage>
uint32_t packed(int low, int high) {
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    return bits(static_cast<float>(low)) >> 16 | (bits(static_cast<float>(high)) & 0xFFFF0000u);
  } else {
    const auto half = [](int value) -> uint32_t {
      if (value == 0) return 0;
      const uint32_t word = bits(static_cast<float>(value));
      return (word >> 16 & 0x8000u) | (((word >> 23 & 0xFFu) - 112) << 10) | (word >> 13 & 0x3FFu);
    };
    return half(low) | half(high) << 16;
  }
}

template <class Storage>
FUSEDREG_KERNEL void product(FUSEDREG_PARAMETER Params params) {
  const int g = lane() / 4, t = lane() % 4;
  uint32_t a[4], b[2];
  if constexpr (std::is_same_v<Storage, float>) {
    for (int r = 0; r < 4; ++r) a[r] = bits(static_cast<float>(a_value(g + r % 2 * 8, t + r / 2 * 4)));
    for (int r = 0; r < 2; ++r) b[r] = bits(static_cast<float>(b_value(t + r * 4, g)));
  } else {
    for (int r = 0; r < 4; ++r) {
      const int row = g + r % 2 * 8, k = 2 * t + r / 2 * 8;
      a[r] = packed<Storage>(a_value(row, k), a_value(row, k + 1));
    }
    for (int r = 0; r < 2; ++r) b[r] = packed<Storage>(b_value(2 * t + r * 8, g), b_value(2 * t + r * 8 + 1, g));
  }
  float c[4] = {1, 2, 3, 4};
  mma<Storage>(c, a, b);
  for (int i = 0; i < 4; ++i) params.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

template <int depth>
float product_expected(int index) {
  const int row = index / 8, column = index % 8;
  int sum = 1 + row / 8 * 2 + column % 2;
  for (int k = 0; k < depth; ++k) sum += a_value(row, k) * b_value(k, column);
  return static_cast<float>(sum);
}

using Expected = float (*)(int);

template <auto kernel>
std::string run(Launch how, Expected expected = nullptr, bool print = false) {
  std::vector<float> out(kBlocks * kThreads, -1), buffer(2 * kBlocks * kThreads);
  std::vector<uint32_t> flags(kBlocks);
  how.shared_bytes = 4096;
  launch<kernel>(how, Params{out.data(), buffer.data(), flags.data()});
  if (print) {
    std::string text;
    for (const float value : out) text += std::to_string(static_cast<int>(value)) + " ";
    return text;
  }
  const int count = how.grid_x * how.threads < 128 ? 128 : how.grid_x * how.threads;
  for (int i = 0; expected != nullptr && i < count; ++i) {
    if (out[i] != expected(how.grid_x == 1 ? i : i % kThreads)) return "wrong";
  }
  return "right";
}

const Launch kWarp{1, 1, 32, 0, false, 1, nullptr};
const Launch kBlock{kBlocks, 1, kThreads, 0, false, 1, nullptr};
const Launch kGrid{kBlocks, 1, kThreads, 0, true, 1, nullptr};
const Launch kCluster{kBlocks, 1, kThreads, 0, false, kBlocks, nullptr};
const Launch kTooLarge{200, 1, kThreads, 0, true, 1, nullptr};

const std::map<std::string, std::function<std::string()>> kCases = {
    {"barriers", [] { return run<neighbours<true, true>>(kBlock, neighbours_expected); }},
    {"no_barrier_before", [] { return run<neighbours<false, true>>(kBlock, neighbours_expected); }},
    {"no_barrier_after", [] { return run<neighbours<true, false>>(kBlock, neighbours_expected); }},
    {"warp", [] { return run<lanes<true>>(kBlock, lanes_expected); }},
    {"no_sync_warp", [] { return run<lanes<false>>(kBlock, lanes_expected); }},
    {"fetches", [] { return run<fetches<true>>(kBlock, fetches_expected); }},
    {"no_wait_for_fetched", [] { return run<fetches<false>>(kBlock, fetches_expected); }},
    {"shuffles", [] { return run<shuffles>(kBlock, shuffles_expected); }},
    {"exchange", [] { return run<exchange<true, true, true, true>>(kGrid, exchange_expected); }},
    {"no_release", [] { return run<exchange<false, true, true, true>>(kGrid, exchange_expected); }},
    {"no_acquire", [] { return run<exchange<true, false, true, true>>(kGrid, exchange_expected); }},
    {"no_barrier_of_writers", [] { return run<exchange<true, true, false, true>>(kGrid, exchange_expected); }},
    {"no_hand_over", [] { return run<exchange<true, true, true, false>>(kGrid, exchange_expected); }},
    {"bounded_wait", [] { return run<never>(kGrid); }},
    {"unbounded_wait", [] { return run<never_unbounded>(kGrid); }},
    {"cluster", [] { return run<cluster_sum<true, true>>(kCluster, cluster_expected); }},
    {"no_cluster_barrier", [] { return run<cluster_sum<false, true>>(kCluster, cluster_expected); }},
    {"leaves_early", [] { return run<cluster_sum<true, false>>(kCluster, cluster_expected); }},
    {"arrives_twice", [] { return run<arrives_twice>(kCluster); }},
    {"one_stays_away", [] { return run<one_stays_away>(kBlock); }},
    {"diverging_warp", [] { return run<diverging_warp>(kWarp); }},
    {"writes_outside", [] { return run<writes_outside>(kBlock); }},
    {"too_large", [] { return run<order>(kTooLarge); }},
    {"order", [] { return run<order>(kGrid, nullptr, true); }},
    {"mma_bfloat16", [] { return run<product<BFloat16>>(kWarp, product_expected<16>); }},
    {"mma_float16", [] { return run<product<Float16>>(kWarp, product_expected<16>); }},
    {"mma_float32", [] { return run<product<float>>(kWarp, product_expected<8>); }},
};

}  // namespace fusedreg::cuda

int main(int count, char** arguments) {
  const auto found = count == 3 ? fusedreg::cuda::kCases.find(arguments[1]) : fusedreg::cuda::kCases.end();
  if (found == fusedreg::cuda::kCases.end()) return 2;
  for (int seed = 0; seed < std::atoi(arguments[2]); ++seed) {
    fusedreg::cuda::emulation::set_schedule(static_cast<uint64_t>(seed));
    try {
      std::printf("%s\n", found->second().c_str());
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
    }
  }
  return 0;
}
