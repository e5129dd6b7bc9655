// Means, variances and what normalising by them means, forward and backward.
#pragma once

#include "plan.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

template <class Compute>
FUSEDREG_INLINE Vector<Compute> inverse_square_root(Vector<Compute> x) {
  Vector<Compute> root;
  for (int lane = 0; lane < kWidth<Compute>; ++lane) {
    if constexpr (sizeof(Compute) == 4) {
      root[lane] = __builtin_sqrtf(x[lane]);
    } else {
      root[lane] = __builtin_sqrt(x[lane]);
    }
  }
  return Compute(1) / root;
}

// One vector of columns, each with its own mean and biased variance.
template <class Compute>
struct Moments {
  Vector<Compute> mean, variance;
  bool of_batch;  // taken from the batch: the gradient flows through them

  FUSEDREG_METHOD Vector<Compute> scale(double eps) const {
    return inverse_square_root<Compute>(variance + static_cast<Compute>(eps));
  }
  // What (x - mean) is multiplied with on the way back, where x may have been recomputed: without any spread in the
  // batch the normalised value is exactly 0, and a last bit of x must not become 1 / sqrt(eps) times itself.
  FUSEDREG_METHOD Vector<Compute> spread_scale(double eps) const {
    const Vector<Compute> given = scale(eps);
    return of_batch ? (variance > 0 ? given : Vector<Compute>{}) : given;
  }
};

// The sum of `term(row)` from `first` up to `last`, by halves: rounding grows with the logarithm of their number, where
// one sum in turn would lose digits over the hundred thousand pairs of a pooled sequence.
template <class V, class Term>
static V sum_by_halves(int64_t first, int64_t last, const Term& term) {
  constexpr int64_t in_turn = 16;
  if (last - first > in_turn) {
    const int64_t middle = first + (last - first) / 2;
    return sum_by_halves<V>(first, middle, term) + sum_by_halves<V>(middle, last, term);
  }
  V sum{};
  for (int64_t row = first; row < last; ++row) sum += term(row);
  return sum;
}

// Over `rows` rows that stand `stride` apart, in two passes: the variance of what the mean has been taken from.
template <class Compute>
static Moments<Compute> moments_of_columns(const Compute* from, int64_t stride, int64_t rows) {
  using V = Vector<Compute>;
  const Compute inverse = Compute(1) / static_cast<Compute>(rows);
  const V sum = sum_by_halves<V>(0, rows, [&](int64_t row) { return load<Compute>(from + row * stride); });
  const V mean = sum * inverse;
  const V squares = sum_by_halves<V>(0, rows, [&](int64_t row) {
    const V difference = load<Compute>(from + row * stride) - mean;
    return difference * difference;
  });
  return {mean, squares * inverse, true};
}

// Population statistics of `count` columns from `column` on: row `index` of the buffers, or mean 0 and variance 1.
template <class Compute>
FUSEDREG_INLINE Moments<Compute> population_moments(const void* mean, const void* variance, const int64_t* indices,
                                                    int64_t s, int64_t columns, int64_t column, int count) {
  const int64_t index = indices == nullptr ? -1 : indices[s];
  if (index < 0 || mean == nullptr) return {Vector<Compute>{}, broadcast<Compute>(1), false};
  const int64_t at = index * columns + column;
  return {load_some(static_cast<const Compute*>(mean) + at, count),
          load_some(static_cast<const Compute*>(variance) + at, count), false};
}

// Row `row` of a statistics result (rows, 2, columns).
template <class Compute>
FUSEDREG_INLINE void store_moments(void* statistics, int64_t row, int64_t columns, int64_t column, int count,
                                   const Moments<Compute>& moments) {
  if (statistics == nullptr) return;
  Compute* to = static_cast<Compute*>(statistics) + row * 2 * columns + column;
  store_some(to, moments.mean, count);
  store_some(to + columns, moments.variance, count);
}

template <class Compute>
FUSEDREG_INLINE Moments<Compute> load_moments(const void* statistics, int64_t row, int64_t columns, int64_t column,
                                              int count, bool of_batch) {
  const Compute* from = static_cast<const Compute*>(statistics) + row * 2 * columns + column;
  return {load_some(from, count), load_some(from + columns, count), of_batch};
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
