// Products with a weight as it stands, for calls too short to pay for packing it: dot products of its rows.
#pragma once

#include "plan.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

// Lane i of the result is the sum of all lanes of vectors[i]. Each level folds two vectors into one: of lane i's two
// halves at this distance, one comes from the vector that answers for lanes without this bit, one from that with it.
template <class Compute, int Distance>
FUSEDREG_INLINE void fold_lanes(Vector<Compute> (&vectors)[kWidth<Compute>]) {
  using Integers = typename VectorTypes<Compute>::Integers;
  constexpr int width = kWidth<Compute>;
  Integers own, other;
  for (int lane = 0; lane < width; ++lane) {
    const int from = (lane & Distance) != 0 ? width : 0;
    own[lane] = lane + from;
    other[lane] = (lane ^ Distance) + from;
  }
#pragma GCC unroll 16
  for (int n = 0; n < Distance; ++n) {
    vectors[n] = shuffled<Compute>(vectors[n], vectors[n + Distance], own) +
                 shuffled<Compute>(vectors[n], vectors[n + Distance], other);
  }
  if constexpr (Distance > 1) fold_lanes<Compute, Distance / 2>(vectors);
}

// left . W^T for one row and one vector of a gate's units: W's rows `unit` ... of `gate`, each `columns` long.
template <class Storage>
static Vector<ComputeOf<Storage>> dot_units(const ComputeOf<Storage>* left, const Storage* weight, int64_t columns,
                                            int units) {
  using Compute = ComputeOf<Storage>;
  constexpr int width = kWidth<Compute>;
  Vector<Compute> sums[width];
  const Storage* rows[width];
#pragma GCC unroll 16
  for (int lane = 0; lane < width; ++lane) {
    sums[lane] = Vector<Compute>{};
    rows[lane] = weight + (lane < units ? lane : 0) * columns;
  }
  int64_t k = 0;
  for (; k + width <= columns; k += width) {
    const Vector<Compute> value = load<Compute>(left + k);
#pragma GCC unroll 16
    for (int lane = 0; lane < width; ++lane) sums[lane] += value * load_full(rows[lane] + k);
  }
  if (k < columns) {
    const int rest = static_cast<int>(columns - k);
    const Vector<Compute> value = load_some(left + k, rest);
    for (int lane = 0; lane < width; ++lane) sums[lane] += value * load_some(rows[lane] + k, rest);
  }
  fold_lanes<Compute, width / 2>(sums);
  Vector<Compute> result = sums[0];
  if (units < width) {
    for (int lane = 0; lane < width; ++lane) result[lane] = lane < units ? result[lane] : Compute(0);
  }
  return result;
}

// The same for a tile: some rows and all four gates. As multiply_tile, `out_vector` is the distance between gates.
template <class Storage>
static void dot_tile(const Plan<Storage>& plan, int rows, const ComputeOf<Storage>* left, int64_t left_row,
                     int64_t left_gate, const Storage* weight, int64_t columns, int64_t unit, ComputeOf<Storage>* out,
                     int64_t out_row, int64_t out_vector) {
  const int units = static_cast<int>(smaller(kWidth<ComputeOf<Storage>>, plan.H - unit));
  for (int gate = 0; gate < 4; ++gate) {
    const Storage* first = weight + (gate * plan.H + unit) * columns;
    for (int m = 0; m < rows; ++m) {
      store<ComputeOf<Storage>>(out + m * out_row + gate * out_vector,
                                dot_units(left + m * left_row + gate * left_gate, first, columns, units));
    }
  }
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
