// How the forward keeps gates for the backward.
//
// float32 and float64 keep them as they are. Beside 16-bit inputs, gates after their activations are kept in 16-bit
// fixed point: they lie in [0, 1] or [-1, 1], where that is exact to 8e-6, against 2e-3 in bfloat16, which would be the
// largest error of the whole backward. Raw pre-activations, which a norm's backward needs, have no such bounds and are
// kept in float32. NaN has a mark of its own, so that a diverged state stays visible in the gradients.
#pragma once

#include "simd.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

typedef int16_t FixedPoint;
typedef FixedPoint FixedVector __attribute__((vector_size(kVectorBytes / 2)));
constexpr FixedPoint kFixedNan = -32768;

template <class Storage>
constexpr bool kNarrow = sizeof(Storage) == 2;

template <class Storage>
constexpr int64_t kept_bytes(bool raw) {
  return kNarrow<Storage> ? (raw ? 4 : 2) : static_cast<int64_t>(sizeof(Storage));
}

// x in [offset - 1 / scale, offset + 1 / scale] -> scale * 32767 * (x - offset), rounded.
template <class Storage, class V>
FUSEDREG_INLINE void keep_activation(char* to, V value, bool is_tanh, int count) {
  if constexpr (!kNarrow<Storage>) {
    store_some(reinterpret_cast<Storage*>(to), value, count);
  } else {
    using Integers = VectorTypes<float>::Integers;
    const float offset = is_tanh ? 0.0f : 0.5f, scale = is_tanh ? 32767.0f : 65534.0f;
    constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer, which is then in the low bits
    const Integers rounded = (Integers)((value - offset) * scale + magic) - 0x4B400000;
    const Integers marked = (value != value) ? (Integers{} + kFixedNan) : rounded;
    const FixedVector narrow = __builtin_convertvector(marked, FixedVector);
    __builtin_memcpy(to, &narrow,
                     static_cast<size_t>(count < kWidth<float> ? count : kWidth<float>) * sizeof(FixedPoint));
  }
}

template <class Storage>
FUSEDREG_INLINE Vector<ComputeOf<Storage>> kept_activation(const char* from, bool is_tanh, int count) {
  if constexpr (!kNarrow<Storage>) {
    return load_some(reinterpret_cast<const Storage*>(from), count);
  } else {
    FixedVector narrow{};
    __builtin_memcpy(&narrow, from,
                     static_cast<size_t>(count < kWidth<float> ? count : kWidth<float>) * sizeof(FixedPoint));
    const float offset = is_tanh ? 0.0f : 0.5f, scale = is_tanh ? 1.0f / 32767.0f : 1.0f / 65534.0f;
    const Vector<float> value = __builtin_convertvector(narrow, Vector<float>) * scale + offset;
    const auto marked = __builtin_convertvector(narrow == kFixedNan, VectorTypes<float>::Integers);
    return marked ? broadcast<float>(__builtin_nanf("")) : value;
  }
}

template <class Storage, class V>
FUSEDREG_INLINE void keep_raw(char* to, V value, int count) {
  store_some(reinterpret_cast<ComputeOf<Storage>*>(to), value, count);
}

template <class Storage>
FUSEDREG_INLINE Vector<ComputeOf<Storage>> kept_raw(const char* from, int count) {
  return load_some(reinterpret_cast<const ComputeOf<Storage>*>(from), count);
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
