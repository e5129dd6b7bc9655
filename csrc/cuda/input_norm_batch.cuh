// N_r by the statistics of each step's rows (Cooijmans et al. 2017), there and back: a thread has one column of a step.
#pragma once

#include "input_norm.cuh"

namespace fusedreg::cuda {

template <class Storage>
FUSEDREG_DEVICE bool column_of_step(const InputNormParams<Storage>& params, int64_t& s, int64_t& column) {
  const int64_t tiles = pieces(params.site.columns, kElementThreads);
  s = block_index() / tiles;
  column = block_index() % tiles * kElementThreads + thread_index();
  return column < params.site.columns;
}

template <class Storage>
Launch column_launch(const InputNormParams<Storage>& params, void* stream) {
  Launch launch = element_launch(params.site.columns, stream);
  launch.grid_x *= static_cast<int>(params.site.steps);
  return launch;
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void batch_normalize_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  int64_t s, column;
  if (!column_of_step(params, s, column)) return;
  const LayerInputs& in = params.norm.in;
  const int64_t width = params.site.columns, count = params.norm.counts[s];
  const Compute* raw = params.raw() + column;
  Moments<Compute> moments = params.population(s, column);
  if (takes_batch_statistics(in.options, count)) {
    const Compute inverse = Compute(1) / static_cast<Compute>(count);
    GroupedSum<Compute> sum, squares;
    for_each_row_of_step(in, s, [&](int64_t row) { sum.add(raw[row * width]); });
    const Compute mean = sum.sum() * inverse;
    for_each_row_of_step(in, s, [&](int64_t row) {
      const Compute difference = raw[row * width] - mean;
      squares.add(difference * difference);
    });
    moments = {mean, squares.sum() * inverse, false};
  }
  store_moments(params.norm.statistics, s, width, column, count > 0, moments);
  const Compute factor = moments.scale(in.norm_eps) * params.gain(column);
  for_each_row_of_step(in, s, [&](int64_t row) {
    params.normalised[row * width + column] = (raw[row * width] - moments.mean) * factor;
  });
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void batch_norm_backward_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  int64_t s, column;
  if (!column_of_step(params, s, column)) return;
  const LayerInputs& in = params.norm.in;
  const int64_t width = params.site.columns, count = params.norm.counts[s];
  const Compute* raw = params.raw() + column;
  const Compute* grad = params.grad + column;
  const Moments<Compute> moments = params.site.template moments<Compute>(s, s, 0, column);
  const Compute spread = moments.spread_scale(in.norm_eps);
  Compute mean = 0, slope = 0;
  if (!moments.constant) {
    const Compute inverse = Compute(1) / static_cast<Compute>(count);
    GroupedSum<Compute> sum, products;
    for_each_row_of_step(in, s, [&](int64_t row) {
      sum.add(grad[row * width]);
      products.add(grad[row * width] * ((raw[row * width] - moments.mean) * spread));
    });
    mean = sum.sum() * inverse;
    slope = products.sum() * inverse;
  }
  const Compute factor = moments.scale(in.norm_eps) * params.gain(column);
  for (int64_t b = 0; b < in.rows; ++b) {
    const int64_t length = row_length(in, b), row = position(in, length, s) * in.rows + b;
    const Compute normalised = (raw[row * width] - moments.mean) * spread;
    const Compute value = factor * (grad[row * width] - mean - normalised * slope);
    params.result[row * width + column] = narrow<Storage>(s < length ? value : Compute(0));
  }
}

}  // namespace fusedreg::cuda
