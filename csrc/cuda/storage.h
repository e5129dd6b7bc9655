// What the kernels store: 16-bit floating point and the fixed point in which activated gates are kept.
//
// "Storage" is the input's type, "compute" float64 for float64 and float32 for everything narrower.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/philox.h"

namespace fusedreg::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class Storage>
constexpr bool kNarrow = sizeof(Storage) == 2;

template <class Storage>
using ComputeOf = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

FUSEDREG_HOST_DEVICE static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
FUSEDREG_HOST_DEVICE static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// The device converts with one instruction, the host in bits; both make the same bits, NaN (0x7fff) included.

FUSEDREG_HOST_DEVICE static inline float widen(BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}

FUSEDREG_HOST_DEVICE static inline float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  // Subnormal: a whole number of 2^-24.
  return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
#endif
}

FUSEDREG_HOST_DEVICE static inline float widen(float value) { return value; }
FUSEDREG_HOST_DEVICE static inline double widen(double value) { return value; }

// Rounds to nearest, ties to even.
template <class Storage>
FUSEDREG_HOST_DEVICE static inline Storage narrow(ComputeOf<Storage> value) {
  if constexpr (!kNarrow<Storage>) {
    return value;
  } else {
    Storage result;
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<Storage, BFloat16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    }
#else
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      result.bits = 0x7fffu;
      return result;
    }
    uint32_t rounded;
    if constexpr (std::is_same_v<Storage, BFloat16>) {
      rounded = (magnitude + 0x7fffu + (magnitude >> 16 & 1u)) >> 16;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above: infinity
      rounded = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {  // 2^-14 and above: normal
      rounded = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    } else {
      // Adding 0.5 lines the last bit of a subnormal, 2^-24, up with that of the sum, and rounds there.
      rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    }
    result.bits = static_cast<uint16_t>(rounded | (bits >> 16 & 0x8000u));
#endif
    return result;
  }
}

// `value` as it is once stored.
template <class Storage>
FUSEDREG_HOST_DEVICE static inline ComputeOf<Storage> rounded_to(ComputeOf<Storage> value) {
  return widen(narrow<Storage>(value));
}

// Activated gates beside 16-bit inputs are kept in 16-bit fixed point, the format of every backend of this project:
// gates lie in [0, 1] or [-1, 1], where that is exact to 8e-6, against 2e-3 in bfloat16, which would be the largest
// error of the whole backward. NaN has a mark of its own, so that a diverged state stays visible in the gradients.
template <class Storage>
using Kept = std::conditional_t<kNarrow<Storage>, int16_t, ComputeOf<Storage>>;
constexpr int16_t kFixedNan = -32768;

// Value in [offset - 1 / scale, offset + 1 / scale] -> scale * 32767 * (value - offset), rounded.
template <class Storage>
FUSEDREG_HOST_DEVICE static inline Kept<Storage> keep_activation(ComputeOf<Storage> value, bool is_tanh) {
  if constexpr (!kNarrow<Storage>) {
    return value;
  } else {
    const float offset = is_tanh ? 0.0f : 0.5f, scale = is_tanh ? 32767.0f : 65534.0f;
    constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer, which is then in the low bits
    const int32_t rounded = static_cast<int32_t>(bits_of((value - offset) * scale + magic) - 0x4B400000u);
    return value != value ? kFixedNan : static_cast<int16_t>(rounded);
  }
}

template <class Storage>
FUSEDREG_HOST_DEVICE static inline ComputeOf<Storage> kept_activation(Kept<Storage> kept, bool is_tanh) {
  if constexpr (!kNarrow<Storage>) {
    return kept;
  } else {
    const float offset = is_tanh ? 0.0f : 0.5f, scale = is_tanh ? 1.0f / 32767.0f : 1.0f / 65534.0f;
    return kept == kFixedNan ? float_of(0x7fc00000u) : static_cast<float>(kept) * scale + offset;
  }
}

}  // namespace fusedreg::cuda
