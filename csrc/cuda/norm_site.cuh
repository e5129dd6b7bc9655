// How one norm has normalised one value of a (T, B, columns) array: found from the statistics that the forward kept.
#pragma once

#include "cell_step.cuh"
#include "moments.cuh"

namespace fusedreg::cuda {

struct NormSite {
  NormKind kind;
  bool pooled;    // batch norm over all steps together
  bool training;  // batch norm: a step that two rows or more reach has statistics of its own
  const void* statistics;
  const int64_t* counts;  // of count_rows, with batch norm
  int64_t steps, rows, columns;

  // Of row (t, b), which is processed at s, in one column.
  template <class Compute>
  FUSEDREG_DEVICE Moments<Compute> moments(int64_t s, int64_t t, int64_t b, int64_t column) const {
    if (kind == NormKind::Layer) return load_moments<Compute>(statistics, t, rows, b, false);
    const bool constant = !(training && counts[pooled ? steps : s] >= 2);
    return load_moments<Compute>(statistics, pooled ? 0 : s, columns, column, constant);
  }
};

inline NormSite norm_site(const LayerInputs& in, bool input, int64_t columns, const void* statistics,
                          const int64_t* counts) {
  return {in.options.norm,
          input && in.options.norm_input_sequence,
          in.options.training,
          statistics,
          counts,
          in.steps,
          in.rows,
          columns};
}

// The step at which position t of a row is processed; the other way round it is position() itself.
FUSEDREG_DEVICE int64_t step_of(const LayerInputs& in, int64_t length, int64_t t) { return position(in, length, t); }

}  // namespace fusedreg::cuda
