// Means and variances of both norms, where they are kept, and what normalising by them means.
//
// Batch norm's results are (T, 2, columns), by the processed step; layer norm's are (T, 2, B), by position. [:, 0] is
// the mean, [:, 1] the biased variance.
#pragma once

#include <cmath>

#include "device.h"
#include "loop.h"
#include "storage.h"

namespace fusedreg::cuda {

template <class Compute>
struct Moments {
  Compute mean = 0, variance = 1;
  bool constant = true;  // not taken from the values themselves: no gradient flows through them

  FUSEDREG_DEVICE Compute scale(double eps) const {
    return Compute(1) / std::sqrt(variance + static_cast<Compute>(eps));
  }
  // What (x - mean) is multiplied with on the way back, where x may have been recomputed: without any spread the
  // normalised value is exactly 0, and a last bit of x must not become 1 / sqrt(eps) times itself.
  FUSEDREG_DEVICE Compute spread_scale(double eps) const { return constant || variance > 0 ? scale(eps) : Compute(0); }
};

// Population statistics of one column at step s: a row of the running buffers, or mean 0 and variance 1 without one.
template <class Compute>
FUSEDREG_DEVICE Moments<Compute> population_moments(const LoopInputs& layer, const void* mean, const void* variance,
                                                    int64_t s, int64_t columns, int64_t column) {
  const int64_t* indices = layer.in.running.index;
  const int64_t given = indices == nullptr ? -1 : indices[s];
  const int64_t row = given < layer.running_rows ? given : layer.running_rows - 1;
  if (row < 0 || mean == nullptr) return {};
  const int64_t at = row * columns + column;
  return {static_cast<const Compute*>(mean)[at], static_cast<const Compute*>(variance)[at], true};
}
template <class Compute>
FUSEDREG_DEVICE Moments<Compute> recurrent_population(const LoopInputs& layer, int64_t s, int64_t column) {
  const RunningStatistics& running = layer.in.running;
  return population_moments<Compute>(layer, running.recurrent_mean, running.recurrent_var, s, 4 * layer.in.hidden_size,
                                     column);
}
template <class Compute>
FUSEDREG_DEVICE Moments<Compute> cell_population(const LoopInputs& layer, int64_t s, int64_t unit) {
  const RunningStatistics& running = layer.in.running;
  return population_moments<Compute>(layer, running.cell_mean, running.cell_var, s, layer.in.hidden_size, unit);
}

// Batch norm: whether step s, which `count` rows reach, is normalised by its own rows.
FUSEDREG_DEVICE bool takes_batch_statistics(const Options& options, int64_t count) {
  return options.training && count >= 2;
}

// One column, or one row, of a statistics result; null: not wanted. `columns` is B for layer norm. A step that no row
// reaches, and a row in padding, is marked with zeros.
template <class Compute>
FUSEDREG_DEVICE void store_moments(void* statistics, int64_t step, int64_t columns, int64_t column, bool reached,
                                   const Moments<Compute>& moments) {
  if (statistics == nullptr) return;
  Compute* to = static_cast<Compute*>(statistics) + step * 2 * columns + column;
  to[0] = reached ? moments.mean : Compute(0);
  to[columns] = reached ? moments.variance : Compute(0);
}

template <class Compute>
FUSEDREG_DEVICE Moments<Compute> load_moments(const void* statistics, int64_t step, int64_t columns, int64_t column,
                                              bool constant) {
  const Compute* from = static_cast<const Compute*>(statistics) + step * 2 * columns + column;
  return {from[0], from[columns], constant};
}

// A gain or shift, in storage; `otherwise` where it is absent.
template <class Storage>
FUSEDREG_DEVICE ComputeOf<Storage> norm_parameter(const void* values, int64_t column, ComputeOf<Storage> otherwise) {
  return values == nullptr ? otherwise : widen(static_cast<const Storage*>(values)[column]);
}

}  // namespace fusedreg::cuda
