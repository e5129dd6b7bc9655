// N_r on the device: what its kernels are given, and what they share.
#pragma once

#include "elementwise.h"
#include "input_norm.h"
#include "norm_site.cuh"

namespace fusedreg::cuda {

constexpr int64_t kSummedInARow = 32;  // terms, so that rounding grows with the groups and not with the rows

template <class Storage>
struct InputNormParams {
  using Compute = ComputeOf<Storage>;
  InputNorm norm;
  NormSite site;
  Compute* normalised;
  Compute* partial;  // of pooled statistics: (pieces, 3, 4H), of which the count, the mean, the sum of squares
  int64_t rows_a_piece, pieces;
  const Compute* grad;
  const Compute* totals;
  Storage* result;

  FUSEDREG_DEVICE const Compute* raw() const { return static_cast<const Compute*>(norm.raw); }
  FUSEDREG_DEVICE Compute gain(int64_t column) const {
    return norm_parameter<Storage>(norm.in.norm.input_weight, column, Compute(1));
  }
  FUSEDREG_DEVICE Moments<Compute> population(int64_t s, int64_t column) const {
    const RunningStatistics& running = norm.in.running;
    const int64_t given = running.input_index == nullptr ? -1 : running.input_index[s];
    const int64_t row = given < norm.running_rows ? given : norm.running_rows - 1;
    if (row < 0 || running.input_mean == nullptr) return {};
    const int64_t at = row * site.columns + column;
    return {static_cast<const Compute*>(running.input_mean)[at], static_cast<const Compute*>(running.input_var)[at],
            true};
  }
};

// Calls visit(t * B + b) for each row that step s reaches.
template <class Visit>
FUSEDREG_DEVICE void for_each_row_of_step(const LayerInputs& in, int64_t s, const Visit& visit) {
  for (int64_t b = 0; b < in.rows; ++b) {
    const int64_t length = row_length(in, b);
    if (s < length) visit(position(in, length, s) * in.rows + b);
  }
}

// A sum of many terms, in groups.
template <class Compute>
struct GroupedSum {
  Compute total = 0, group = 0;
  int64_t terms = 0;
  FUSEDREG_DEVICE void add(Compute value) {
    group += value;
    if (++terms % kSummedInARow == 0) {
      total += group;
      group = 0;
    }
  }
  FUSEDREG_DEVICE Compute sum() const { return total + group; }
};

// The element that is this thread's; false in padding and past the end.
template <class Storage>
FUSEDREG_DEVICE bool own_element(const InputNormParams<Storage>& params, int64_t& at, int64_t& column, bool& valid) {
  const LayerInputs& in = params.norm.in;
  at = element_index();
  column = at % params.site.columns;
  const int64_t row = at / params.site.columns;
  if (row >= in.steps * in.rows) return false;
  valid = row / in.rows < row_length(in, row % in.rows);
  return true;
}

template <class Storage>
FUSEDREG_DEVICE Moments<ComputeOf<Storage>> moments_at(const InputNormParams<Storage>& params, int64_t at) {
  const LayerInputs& in = params.norm.in;
  const int64_t column = at % params.site.columns, row = at / params.site.columns;
  const int64_t t = row / in.rows, b = row % in.rows;
  return params.site.template moments<ComputeOf<Storage>>(step_of(in, row_length(in, b), t), t, b, column);
}

}  // namespace fusedreg::cuda
