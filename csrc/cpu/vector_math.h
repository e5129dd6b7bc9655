// exp, sigmoid and tanh of a vector.
//
// With n = round(x / ln 2) and r = x - n ln 2, |r| <= ln 2 / 2: exp(x) = 2^n (1 + p(r)), where p is the Taylor
// polynomial of expm1, of degree 7 in float (truncation below 2e-8) and 13 in double (below 2e-17). tanh is built on
// expm1, not on exp, so that it keeps its relative precision near 0 and never divides infinity by infinity.
#pragma once

#include "simd.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

template <class Compute>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = int32_t;
  static constexpr float lowest = -87.0f, highest = 87.0f;
  static constexpr float magic = 0x1.8p23f;  // adding it leaves round(x) in the low bits
  static constexpr Bits magic_bits = 0x4B400000;
  static constexpr float inverse_ln2 = 0x1.715476p0f;
  static constexpr float ln2_high = 0x1.62e400p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr int degree = 7;
  static constexpr int mantissa_bits = 23;
  static constexpr Bits one_bits = 0x3F800000;
  static constexpr float tanh_saturates = 20.0f;  // of 2 |x|
};

template <>
struct ExpConstants<double> {
  using Bits = int64_t;
  static constexpr double lowest = -708.0, highest = 708.0;
  static constexpr double magic = 0x1.8p52;
  static constexpr Bits magic_bits = 0x4338000000000000;
  static constexpr double inverse_ln2 = 0x1.71547652b82fep0;
  static constexpr double ln2_high = 0x1.62e42fefa3800p-1, ln2_low = 0x1.ef35793c76730p-45;
  static constexpr int degree = 13;
  static constexpr int mantissa_bits = 52;
  static constexpr Bits one_bits = 0x3FF0000000000000;
  static constexpr double tanh_saturates = 40.0;
};

template <class Compute>
struct ScaledExpm1 {
  Vector<Compute> scale;  // 2^n
  Vector<Compute> expm1;  // exp(r) - 1
};

template <class Compute>
FUSEDREG_INLINE ScaledExpm1<Compute> scaled_expm1(Vector<Compute> x) {
  using C = ExpConstants<Compute>;
  using V = Vector<Compute>;
  using Integers = typename VectorTypes<Compute>::Integers;
  static constexpr Compute inverse_factorial[14] = {Compute(1.0),
                                                    Compute(1.0),
                                                    Compute(1.0 / 2),
                                                    Compute(1.0 / 6),
                                                    Compute(1.0 / 24),
                                                    Compute(1.0 / 120),
                                                    Compute(1.0 / 720),
                                                    Compute(1.0 / 5040),
                                                    Compute(1.0 / 40320),
                                                    Compute(1.0 / 362880),
                                                    Compute(1.0 / 3628800),
                                                    Compute(1.0 / 39916800),
                                                    Compute(1.0 / 479001600),
                                                    Compute(1.0 / 6227020800.0)};
  const V shifted = x * C::inverse_ln2 + C::magic;
  const V n = shifted - C::magic;
  const V r = (x - n * C::ln2_high) - n * C::ln2_low;
  V p = broadcast<Compute>(inverse_factorial[C::degree]);
#pragma GCC unroll 16
  for (int k = C::degree - 1; k >= 2; --k) p = p * r + inverse_factorial[k];
  const Integers exponent = (Integers)shifted - C::magic_bits;
  const V scale = (V)((exponent << C::mantissa_bits) + C::one_bits);
  return {scale, r + r * r * p};
}

// NaN passes through: the comparisons are false for it, and the instructions return their second operand.
template <class V, class Compute>
FUSEDREG_INLINE V clamped(V x, Compute low, Compute high) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Compute) == 4) {
    return (V)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Compute) == 4) {
    return (V)_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), (__m256)x));
  }
#endif
  x = x < low ? V{} + low : x;
  return x > high ? V{} + high : x;
}

template <class Compute>
FUSEDREG_INLINE Vector<Compute> sigmoid_of(Vector<Compute> x) {
  using C = ExpConstants<Compute>;
  const ScaledExpm1<Compute> e = scaled_expm1<Compute>(clamped(-x, C::lowest, C::highest));
  return Compute(1) / (Compute(1) + (e.scale * e.expm1 + e.scale));
}

template <class Compute>
FUSEDREG_INLINE Vector<Compute> tanh_of(Vector<Compute> x) {
  using C = ExpConstants<Compute>;
  using V = Vector<Compute>;
  const V doubled = x + x;
  const V magnitude = clamped(doubled < Compute(0) ? -doubled : doubled, Compute(0), C::tanh_saturates);
  const ScaledExpm1<Compute> e = scaled_expm1<Compute>(magnitude);
  const V expm1 = e.scale * e.expm1 + (e.scale - Compute(1));
  const V result = expm1 / (expm1 + Compute(2));
  return x < Compute(0) ? -result : result;
}

FUSEDREG_INLINE Vector<float> sigmoid(Vector<float> x) { return sigmoid_of<float>(x); }
FUSEDREG_INLINE Vector<double> sigmoid(Vector<double> x) { return sigmoid_of<double>(x); }
FUSEDREG_INLINE Vector<float> tanh(Vector<float> x) { return tanh_of<float>(x); }
FUSEDREG_INLINE Vector<double> tanh(Vector<double> x) { return tanh_of<double>(x); }

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
