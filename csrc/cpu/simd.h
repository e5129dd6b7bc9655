// Vectors of the widest kind that the instruction set has, with the compiler's own vector types: one source for
// every instruction set. Everything here is static or in the instruction set's namespace, so that no function that
// was compiled for a wide machine can be linked into code for a narrow one.
#pragma once

#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 header initialises its "undefined" registers with themselves and is warned about it.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../common/params.h"
#include "../common/philox.h"

#ifndef FUSEDREG_ISA_NAMESPACE
#error "compile kernels.cpp with -DFUSEDREG_ISA_NAMESPACE=avx512, avx2 or portable"
#endif

#define FUSEDREG_INLINE static inline __attribute__((always_inline))
#define FUSEDREG_METHOD inline __attribute__((always_inline))  // the same for members

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 6;  // 6 x 4 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 3;  // 3 x 4 of 16
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 5;  // 5 x 4 of 32 registers: with 6 rows GCC runs out of them
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 3;
#endif
constexpr int kTileVectors = 4;  // a unit's four gates side by side

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Vector types for a compute type: V of values, W of the 32-bit words that masks are drawn as.
template <class Compute>
struct VectorTypes;

template <>
struct VectorTypes<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t W __attribute__((vector_size(kVectorBytes)));
  static constexpr int width = kVectorBytes / 4;
};

template <>
struct VectorTypes<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t W __attribute__((vector_size(kVectorBytes / 2)));
  static constexpr int width = kVectorBytes / 8;
};

template <class Compute>
using Vector = typename VectorTypes<Compute>::V;
template <class Compute>
using Words = typename VectorTypes<Compute>::W;
template <class Compute>
constexpr int kWidth = VectorTypes<Compute>::width;

template <class Compute>
FUSEDREG_INLINE Vector<Compute> broadcast(Compute value) {
  return value - Vector<Compute>{};  // x - 0 is x for every x, so the compiler leaves the broadcast alone
}

template <class Compute>
FUSEDREG_INLINE Vector<Compute> load(const Compute* from) {
  Vector<Compute> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <class Compute>
FUSEDREG_INLINE void store(Compute* to, Vector<Compute> value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

// The lanes of x, and of y counted on from x's, that `lanes` names.
template <class Compute>
FUSEDREG_INLINE Vector<Compute> shuffled(Vector<Compute> x, Vector<Compute> y,
                                         typename VectorTypes<Compute>::Integers lanes) {
#if defined(__clang__)
  Vector<Compute> result;  // clang's own shuffle wants literal lanes; it finds the instruction for this itself
  for (int lane = 0; lane < kWidth<Compute>; ++lane) {
    result[lane] = lanes[lane] < kWidth<Compute> ? x[lanes[lane]] : y[lanes[lane] - kWidth<Compute>];
  }
  return result;
#else
  return __builtin_shuffle(x, y, lanes);
#endif
}

// Lanes with this bit of x change places with lanes without it of y.
template <class Compute, int Distance>
FUSEDREG_INLINE void exchange_halves(Vector<Compute>& x, Vector<Compute>& y) {
  typename VectorTypes<Compute>::Integers low, high;
  for (int lane = 0; lane < kWidth<Compute>; ++lane) {
    low[lane] = (lane & Distance) == 0 ? lane : (lane ^ Distance) + kWidth<Compute>;
    high[lane] = (lane & Distance) == 0 ? lane | Distance : lane + kWidth<Compute>;
  }
  const Vector<Compute> first = shuffled<Compute>(x, y, low);
  y = shuffled<Compute>(x, y, high);
  x = first;
}

// The lanes of x and y in turn: x0 y0 x1 y1 ..., from the first halves of both or from the second.
template <class Compute>
FUSEDREG_INLINE Vector<Compute> zipped(Vector<Compute> x, Vector<Compute> y, bool second_halves) {
  typename VectorTypes<Compute>::Integers lanes;
  for (int lane = 0; lane < kWidth<Compute>; ++lane) {
    lanes[lane] = (second_halves ? kWidth<Compute> / 2 : 0) + lane / 2 + (lane % 2) * kWidth<Compute>;
  }
  return shuffled<Compute>(x, y, lanes);
}

// ---- Conversion between the storage types and the compute type, a whole vector at a time ----

FUSEDREG_INLINE Vector<float> load_full(const float* from) { return load<float>(from); }
FUSEDREG_INLINE Vector<double> load_full(const double* from) { return load<double>(from); }
FUSEDREG_INLINE void store_full(float* to, Vector<float> value) { store<float>(to, value); }
FUSEDREG_INLINE void store_full(double* to, Vector<double> value) { store<double>(to, value); }

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

FUSEDREG_INLINE Vector<float> load_full(const BFloat16* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  return (Vector<float>)(__builtin_convertvector(halves, Words<float>) << 16);
}

FUSEDREG_INLINE void store_full(BFloat16* to, Vector<float> value) {
  const Words<float> bits = (Words<float>)value;
  const Words<float> rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);  // to nearest, ties to even
  const Words<float> quiet_nan = bits | 0x400000u;
  const Words<float> result = ((bits & 0x7FFFFFFFu) > 0x7F800000u) ? quiet_nan : rounded;
  const Halves halves = __builtin_convertvector(result >> 16, Halves);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

#if defined(__AVX512F__)
FUSEDREG_INLINE Vector<float> load_full(const Float16* from) {
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
FUSEDREG_INLINE void store_full(Float16* to, Vector<float> value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
FUSEDREG_INLINE Vector<float> load_full(const Float16* from) {
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
FUSEDREG_INLINE void store_full(Float16* to, Vector<float> value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__)
FUSEDREG_INLINE Vector<float> load_full(const Float16* from) {
  return (Vector<float>)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from))));
}
FUSEDREG_INLINE void store_full(Float16* to, Vector<float> value) {
  vst1_u16(reinterpret_cast<uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)value)));
}
#else
// Without a conversion instruction: half to single by an exact multiplication by 2^112, which moves the exponent's
// bias and renormalises subnormals; single to half by adding a power of two at which the rounding happens in place.
FUSEDREG_INLINE Vector<float> load_full(const Float16* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  const Words<float> bits = __builtin_convertvector(halves, Words<float>);
  const Words<float> magnitude = (bits & 0x7FFFu) << 13;
  const Vector<float> scaled = (Vector<float>)magnitude * 0x1p112f;
  const Words<float> special = magnitude | 0x7F800000u;  // infinity and NaN
  const Words<float> finite = (Words<float>)scaled;
  const Words<float> value = (magnitude >= 0x0F800000u) ? special : finite;
  return (Vector<float>)(value | ((bits & 0x8000u) << 16));
}
FUSEDREG_INLINE void store_full(Float16* to, Vector<float> value) {
  const Words<float> bits = (Words<float>)value;
  const Words<float> sign = bits & 0x80000000u;
  const Words<float> magnitude = bits ^ sign;
  // Normal halves: round the 13 surplus bits to nearest even, then move the bias.
  const Words<float> normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Subnormal halves: 0.5 has the unit in the last place of the subnormals, 2^-24.
  const Words<float> subnormal = (Words<float>)((Vector<float>)magnitude + 0.5f) - 0x3F000000u;
  Words<float> result = (magnitude < 0x38800000u) ? subnormal : normal;
  result = (magnitude >= 0x477FF000u) ? (Words<float>{} + 0x7C00u) : result;  // rounds to infinity
  result = (magnitude > 0x7F800000u) ? (Words<float>{} + 0x7E00u) : result;   // NaN
  const Halves halves = __builtin_convertvector(result | (sign >> 16), Halves);
  __builtin_memcpy(to, &halves, sizeof(halves));
}
#endif

// The first `count` values of a vector at the edge of a row. The rest reads as 0 and is not written.
template <class Storage>
FUSEDREG_INLINE auto load_some(const Storage* from, int count) {
  using Result = decltype(load_full(from));
  constexpr int width = sizeof(Result) == kVectorBytes && sizeof(Storage) == 8 ? kVectorBytes / 8 : kVectorBytes / 4;
  if (__builtin_expect(count >= width, 1)) return load_full(from);
  Storage padded[width] = {};
  for (int j = 0; j < count; ++j) padded[j] = from[j];
  return load_full(padded);
}

template <class Storage, class Value>
FUSEDREG_INLINE void store_some(Storage* to, Value value, int count) {
  constexpr int width = sizeof(Storage) == 8 ? kVectorBytes / 8 : kVectorBytes / 4;
  if (__builtin_expect(count >= width, 1)) return store_full(to, value);
  Storage padded[width];
  store_full(padded, value);
  for (int j = 0; j < count; ++j) to[j] = padded[j];
}

// What the value becomes when it is stored: the carried h is the stored h.
template <class Storage, class Value>
FUSEDREG_INLINE Value rounded_to(Value value) {
  Storage stored[sizeof(Value) / sizeof(decltype(value[0]))];
  store_full(stored, value);
  return load_full(stored);
}
template <>
inline __attribute__((always_inline)) Vector<float> rounded_to<float, Vector<float>>(Vector<float> value) {
  return value;
}
template <>
inline __attribute__((always_inline)) Vector<double> rounded_to<double, Vector<double>>(Vector<double> value) {
  return value;
}

template <class Storage>
struct StorageTraits {
  using Compute = float;
};
template <>
struct StorageTraits<double> {
  using Compute = double;
};
template <class Storage>
using ComputeOf = typename StorageTraits<Storage>::Compute;

FUSEDREG_INLINE float to_compute(float value) { return value; }
FUSEDREG_INLINE double to_compute(double value) { return value; }
FUSEDREG_INLINE float to_compute(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}
FUSEDREG_INLINE float to_compute(Float16 value) { return load_some(&value, 1)[0]; }

template <class Storage>
FUSEDREG_INLINE Storage zero_of() {
  Storage zero;
  __builtin_memset(&zero, 0, sizeof(zero));
  return zero;
}

// ---- The words that masks are drawn as, while they are drawn ----

typedef uint64_t WideWords __attribute__((vector_size(kVectorBytes)));

// The 64-bit products of the lower halves of the lanes.
FUSEDREG_INLINE WideWords multiply_words(WideWords words, uint32_t factor) {
#if defined(__AVX512F__)
  return (WideWords)_mm512_mul_epu32((__m512i)words, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (WideWords)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
  return (WideWords)_mm_mul_epu32((__m128i)words, _mm_set1_epi64x(factor));
#elif defined(__aarch64__)
  return (WideWords)vmull_n_u32(vmovn_u64((uint64x2_t)words), factor);
#else
  return (words & 0xFFFFFFFFu) * factor;
#endif
}

// A vector of 32-bit words, each in the lower half of a 64-bit lane, where products of words need no rearranging; the
// upper halves hold anything. Of 4-byte values there are twice as many: the even ones and the odd ones.
template <class Compute>
struct CounterWord {
  static constexpr int parts = 8 / sizeof(Compute);
  WideWords part[parts];

  FUSEDREG_METHOD CounterWord operator^(CounterWord other) const {
    CounterWord result;
    for (int n = 0; n < parts; ++n) result.part[n] = part[n] ^ other.part[n];
    return result;
  }
  FUSEDREG_METHOD CounterWord operator^(uint32_t other) const {
    CounterWord result;
    for (int n = 0; n < parts; ++n) result.part[n] = part[n] ^ other;
    return result;
  }

  // first, first + step, first + 2 step ...
  static FUSEDREG_METHOD CounterWord counting(uint32_t first, uint32_t step) {
    CounterWord result;
    for (int n = 0; n < parts; ++n) {
      for (int lane = 0; lane < kVectorBytes / 8; ++lane) {
        result.part[n][lane] = first + step * static_cast<uint32_t>(lane * parts + n);
      }
    }
    return result;
  }

  FUSEDREG_METHOD Words<Compute> words() const {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the even words are taken to stand before the odd ones");
    if constexpr (parts == 2) {
      return (Words<Compute>)((part[0] & 0xFFFFFFFFu) | (part[1] << 32));
    } else {
      return __builtin_convertvector(part[0], Words<Compute>);
    }
  }
};

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE

namespace fusedreg {

template <class Compute>
struct WideProduct<cpu::FUSEDREG_ISA_NAMESPACE::CounterWord<Compute>> {
  using Word = cpu::FUSEDREG_ISA_NAMESPACE::CounterWord<Compute>;
  static FUSEDREG_METHOD void take(uint32_t a, Word b, Word& high, Word& low) {
    for (int n = 0; n < Word::parts; ++n) {
      low.part[n] = cpu::FUSEDREG_ISA_NAMESPACE::multiply_words(b.part[n], a);
      high.part[n] = low.part[n] >> 32;
    }
  }
};

}  // namespace fusedreg
