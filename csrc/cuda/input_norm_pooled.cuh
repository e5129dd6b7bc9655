// N_r by the statistics of all steps and rows together (Laurent et al. 2016), there and back.
#pragma once

#include "input_norm.cuh"

namespace fusedreg::cuda {

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void pooled_pieces_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = params.norm.in;
  const int64_t width = params.site.columns, column = element_index();
  if (column >= width) return;
  const Compute* raw = params.raw() + column;
  const int64_t first = block_index_y() * params.rows_a_piece, all = in.steps * in.rows;
  const int64_t last = first + params.rows_a_piece < all ? first + params.rows_a_piece : all;
  const auto valid = [&](int64_t row) { return row / in.rows < row_length(in, row % in.rows); };
  int64_t count = 0;
  GroupedSum<Compute> sum, squares;
  for (int64_t row = first; row < last; ++row) {
    if (!valid(row)) continue;
    sum.add(raw[row * width]);
    ++count;
  }
  const Compute mean = count == 0 ? Compute(0) : sum.sum() / static_cast<Compute>(count);
  for (int64_t row = first; row < last; ++row) {
    if (!valid(row)) continue;
    const Compute difference = raw[row * width] - mean;
    squares.add(difference * difference);
  }
  Compute* partial = params.partial + block_index_y() * 3 * width + column;
  partial[0] = static_cast<Compute>(count);
  partial[width] = mean;
  partial[2 * width] = squares.sum();
}

// The pieces' moments become the whole's (Chan, Golub, LeVeque 1983), piece by piece.
template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void pooled_statistics_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = params.norm.in;
  const int64_t width = params.site.columns, column = element_index();
  if (column >= width) return;
  const int64_t all = params.norm.counts[in.steps];
  Moments<Compute> moments = params.population(0, column);
  if (takes_batch_statistics(in.options, all)) {
    Compute count = 0, mean = 0, squares = 0;
    for (int64_t piece = 0; piece < params.pieces; ++piece) {
      const Compute* partial = params.partial + piece * 3 * width + column;
      const Compute added = partial[0];
      if (added == 0) continue;
      const Compute difference = partial[width] - mean, share = added / (count + added);
      mean += difference * share;
      squares += partial[2 * width] + difference * difference * count * share;
      count += added;
    }
    moments = {mean, squares / count, false};
  }
  store_moments(params.norm.statistics, 0, width, column, all > 0, moments);
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void pooled_backward_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  int64_t at, column;
  bool valid;
  if (!own_element(params, at, column, valid)) return;
  Compute value = 0;
  if (valid) {
    const LayerInputs& in = params.norm.in;
    const Moments<Compute> moments = moments_at(params, at);
    value = params.grad[at];
    if (!moments.constant) {
      const Compute inverse = Compute(1) / static_cast<Compute>(params.norm.counts[in.steps]);
      const Compute normalised = (params.raw()[at] - moments.mean) * moments.spread_scale(in.norm_eps);
      value -= params.totals[column] * inverse + normalised * (params.totals[params.site.columns + column] * inverse);
    }
    value *= moments.scale(in.norm_eps) * params.gain(column);
  }
  params.result[at] = narrow<Storage>(value);
}

}  // namespace fusedreg::cuda
