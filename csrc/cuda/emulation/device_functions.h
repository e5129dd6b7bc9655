// device.h for a C++ compiler: twins of the functions of hardware.h. What each promises stands in device.h.
#pragma once

#include <cmath>
#include <cstring>

#include "machine.h"

#define FUSEDREG_KERNEL
#define FUSEDREG_DEVICE inline
#define FUSEDREG_LAUNCH_BOUNDS(threads, blocks)
#define FUSEDREG_PARAMETER const
// Where an error is to name the kernel's line: as the last parameters of a device function.
#define FUSEDREG_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace fusedreg {

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
inline double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
inline float tanh(float x) { return std::tanh(x); }
inline double tanh(double x) { return std::tanh(x); }

}  // namespace fusedreg

namespace fusedreg::cuda {

using fusedreg::sigmoid;
using fusedreg::tanh;

template <auto kernel, class Params>
const void* address_of_kernel() {
  static const emulation::Kernel the_kernel{[](const void* params) { kernel(*static_cast<const Params*>(params)); },
                                            sizeof(Params)};
  return &the_kernel;
}

inline int thread_index() { return emulation::running().index; }
inline int block_threads() { return emulation::launched().threads; }
inline int block_index() { return emulation::running().block->x; }
inline int block_index_y() { return emulation::running().block->y; }
inline int grid_blocks() { return emulation::launched().grid_x; }
inline int lane() { return thread_index() & 31; }
inline int warp_index() { return thread_index() >> 5; }

inline int opaque(int value) { return value; }

inline char* dynamic_shared() { return emulation::running().block->shared; }

inline void sync_block(FUSEDREG_CALLER) { emulation::meet_block({"sync_block", file, line}); }
inline void sync_warp(FUSEDREG_CALLER) { emulation::meet_warp({"sync_warp", file, line}, nullptr, 0); }

template <class T>
T take_from_lane(T value, int from, const emulation::Place& place) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, uint32_t> ||
                std::is_same_v<T, int>);
  const unsigned char* const values = emulation::meet_warp(place, &value, sizeof(T));
  if (from < 0 || from >= emulation::kLanes) emulation::fail("a shuffle reads lane " + std::to_string(from));
  std::memcpy(&value, values + from * emulation::kExchangeBytes, sizeof(T));
  return value;
}

template <class T>
T shuffle_xor(T value, int mask, FUSEDREG_CALLER) {
  return take_from_lane(value, lane() ^ mask, {"shuffle_xor", file, line});
}

template <class T>
T shuffle(T value, int from, FUSEDREG_CALLER) {
  return take_from_lane(value, from, {"shuffle", file, line});
}

inline float to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7F800000u) != 0x7F800000u) bits = (bits + 0x1000u) & 0xFFFFE000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float bfloat16_to_float(uint32_t bits) {
  bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float float16_to_float(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 0x1Fu, mantissa = bits & 0x3FFu;
  uint32_t wide = sign | ((exponent + 112) << 23) | (mantissa << 13);
  if (exponent == 31) wide = sign | 0x7F800000u | (mantissa << 13);
  float value;
  std::memcpy(&value, &wide, 4);
  if (exponent == 0) value = (sign != 0 ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(mantissa), -24);
  return value;
}

// Lane (g = lane / 4, t = lane % 4) brings rows g and g + 8 of A and column g of B, and keeps columns 2t and 2t + 1 of
// those rows of the result. Register r of A holds row g + 8 (r % 2); its k, and that of register r of B, are below.
template <class Storage>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FUSEDREG_CALLER) {
  static_assert(std::is_same_v<Storage, BFloat16> || std::is_same_v<Storage, Float16> ||
                std::is_same_v<Storage, float>);
  constexpr int values = std::is_same_v<Storage, float> ? 1 : 2;  // in a register
  const auto unpack = [](uint32_t word, float* to) {
    if constexpr (std::is_same_v<Storage, float>) {
      word &= 0xFFFFE000u;  // what the hardware ignores, rounded or not
      std::memcpy(to, &word, 4);
    } else if constexpr (std::is_same_v<Storage, BFloat16>) {
      to[0] = bfloat16_to_float(word & 0xFFFFu), to[1] = bfloat16_to_float(word >> 16);
    } else {
      to[0] = float16_to_float(word & 0xFFFFu), to[1] = float16_to_float(word >> 16);
    }
  };
  float mine[6 * values];
  for (int r = 0; r < 4; ++r) unpack(a[r], mine + r * values);
  for (int r = 0; r < 2; ++r) unpack(b[r], mine + (4 + r) * values);
  const unsigned char* const all = emulation::meet_warp({"mma", file, line}, mine, sizeof(mine));
  const int g = lane() / 4, t = lane() % 4;
  for (int out = 0; out < 4; ++out) {
    const int row_half = out / 2, column = 2 * t + out % 2;
    float sum = c[out];
    for (int k = 0; k < 8 * values; ++k) {
      // k counts t within a register's values within a half: half * 4 * values + t * values + value.
      const int half = k / (4 * values), owner = k / values % 4, value = k % values;
      float left, right;
      std::memcpy(&left,
                  all + (g * 4 + owner) * emulation::kExchangeBytes + 4 * ((2 * half + row_half) * values + value), 4);
      std::memcpy(&right, all + (column * 4 + owner) * emulation::kExchangeBytes + 4 * ((4 + half) * values + value),
                  4);
      sum += left * right;
    }
    c[out] = sum;
  }
}

template <class T>
T load_exchanged(const T* from) {
  static_assert(std::is_same_v<T, Words4> || std::is_same_v<T, uint32_t> || std::is_same_v<T, float>);
  T value;
  emulation::visibility().load(emulation::running(), from, &value, sizeof(T));
  return value;
}

template <class T>
void store_exchanged(T* to, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, Words4> || std::is_same_v<T, uint32_t> || std::is_same_v<T, float>);
  emulation::visibility().store(emulation::running(), to, &value, sizeof(T));
}

inline uint32_t load_acquire(const uint32_t* flag, FUSEDREG_CALLER) {
  return emulation::poll(flag, true, {"load_acquire", file, line});
}

inline void store_release(uint32_t* flag, uint32_t value) { emulation::publish(flag, value, true); }
inline void fence_device() { emulation::fence(); }

// As late as it may: when it is waited for.
inline void fetch_to_shared(uint32_t* to, const uint32_t* from) { emulation::running().fetches.push_back({to, from}); }
inline void wait_for_fetched() {
  for (const auto& [to, from] : emulation::running().fetches) *to = *from;
  emulation::running().fetches.clear();
}

inline int cluster_rank() { return emulation::running().block->rank; }
inline int cluster_blocks() { return static_cast<int>(emulation::running().block->cluster->blocks.size()); }
inline void cluster_arrive(FUSEDREG_CALLER) { emulation::arrive_at_cluster(true, {"cluster_arrive", file, line}); }
inline void cluster_wait(FUSEDREG_CALLER) { emulation::wait_for_cluster(true, {"cluster_wait", file, line}); }

template <class T>
void store_to_block(T* address, int rank, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  char* const to = emulation::shared_of(reinterpret_cast<const char*>(address), rank, sizeof(T));
  if (rank == cluster_rank()) {
    *address = value;
  } else {
    emulation::visibility().store_to_cluster(emulation::running(), to, &value, sizeof(T));
  }
}

template <class T>
T load_from_block(const T* address, int rank) {
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  const char* const from = emulation::shared_of(reinterpret_cast<const char*>(address), rank, sizeof(T));
  T value;
  emulation::visibility().load_from_cluster(emulation::running(), from, &value, sizeof(T));
  return value;
}

// What tools/mutate_cuda.py puts in the place of others, to see whether the tests notice: they promise nothing of
// memory.
inline uint32_t load_relaxed(const uint32_t* flag, FUSEDREG_CALLER) {
  return emulation::poll(flag, false, {"load_relaxed", file, line});
}
inline void store_relaxed(uint32_t* flag, uint32_t value) { emulation::publish(flag, value, false); }
inline void cluster_arrive_relaxed(FUSEDREG_CALLER) {
  emulation::arrive_at_cluster(false, {"cluster_arrive", file, line});
}
inline void cluster_pass(FUSEDREG_CALLER) { emulation::wait_for_cluster(false, {"cluster_wait", file, line}); }

inline uint64_t timer_nanoseconds() { return emulation::virtual_nanoseconds(); }

template <class... Integers>
[[noreturn]] void stop(const char* message, Integers... integers) {
  static_assert(sizeof...(integers) <= 4, "stop prints up to four integers");
  std::string text = message;
  ((text += " " + std::to_string(static_cast<long long>(integers))), ...);
  emulation::fail(text);
}

}  // namespace fusedreg::cuda

#undef FUSEDREG_CALLER
