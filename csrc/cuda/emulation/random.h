#pragma once

#include <cstdint>

namespace fusedreg::cuda::emulation {

// xorshift: fast, and the same sequence everywhere.
class Random {
 public:
  void seed(uint64_t value) { state_ = value * 0x9E3779B97F4A7C15u + 0xD1B54A32D192ED03u; }
  uint32_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 32);
  }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((static_cast<uint64_t>(next()) * bound) >> 32); }

 private:
  uint64_t state_ = 1;
};

}  // namespace fusedreg::cuda::emulation
