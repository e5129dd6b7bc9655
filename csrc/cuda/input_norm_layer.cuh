// N_r by the statistics of each row over its 4H values (Ba et al. 2016), there and back: a warp has one row.
#pragma once

#include "input_norm.cuh"

namespace fusedreg::cuda {

constexpr int kRowWarps = kElementThreads / 32;

template <class Compute>
FUSEDREG_DEVICE Compute warp_sum(Compute value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <class Storage>
Launch row_launch(const InputNormParams<Storage>& params, void* stream) {
  return element_launch(params.site.steps * params.site.rows * 32, stream);
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void layer_normalize_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = params.norm.in;
  const int64_t row = static_cast<int64_t>(block_index()) * kRowWarps + warp_index(), width = params.site.columns;
  if (row >= in.steps * in.rows) return;  // warp by warp, and there is no block barrier below
  const int64_t t = row / in.rows, b = row % in.rows;
  const Compute* raw = params.raw() + row * width;
  const bool valid = t < row_length(in, b);
  Moments<Compute> moments;
  if (valid) {
    const Compute inverse = Compute(1) / static_cast<Compute>(width);
    GroupedSum<Compute> sum, squares;
    for (int64_t column = lane(); column < width; column += 32) sum.add(raw[column]);
    const Compute mean = warp_sum(sum.sum()) * inverse;
    for (int64_t column = lane(); column < width; column += 32) {
      squares.add((raw[column] - mean) * (raw[column] - mean));
    }
    moments = {mean, warp_sum(squares.sum()) * inverse, false};
  }
  if (lane() == 0) store_moments(params.norm.statistics, t, in.rows, b, valid, moments);
  if (!valid) return;
  const Compute scale = moments.scale(in.norm_eps);
  for (int64_t column = lane(); column < width; column += 32) {
    params.normalised[row * width + column] = (raw[column] - moments.mean) * scale * params.gain(column);
  }
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void layer_norm_backward_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = params.norm.in;
  const int64_t row = static_cast<int64_t>(block_index()) * kRowWarps + warp_index(), width = params.site.columns;
  if (row >= in.steps * in.rows) return;
  const int64_t t = row / in.rows, b = row % in.rows;
  Storage* result = params.result + row * width;
  if (t >= row_length(in, b)) {
    for (int64_t column = lane(); column < width; column += 32) result[column] = narrow<Storage>(Compute(0));
    return;
  }
  const Compute* raw = params.raw() + row * width;
  const Compute* grad = params.grad + row * width;
  const auto moments = load_moments<Compute>(params.norm.statistics, t, in.rows, b, false);
  const Compute scale = moments.scale(in.norm_eps), spread = moments.spread_scale(in.norm_eps);
  GroupedSum<Compute> sum, products;
  for (int64_t column = lane(); column < width; column += 32) {
    const Compute scaled = grad[column] * params.gain(column);
    sum.add(scaled);
    products.add(scaled * ((raw[column] - moments.mean) * spread));
  }
  const Compute inverse = Compute(1) / static_cast<Compute>(width);
  const Compute mean = warp_sum(sum.sum()) * inverse, slope = warp_sum(products.sum()) * inverse;
  for (int64_t column = lane(); column < width; column += 32) {
    const Compute normalised = (raw[column] - moments.mean) * spread;
    result[column] = narrow<Storage>(scale * (grad[column] * params.gain(column) - mean - normalised * slope));
  }
}

}  // namespace fusedreg::cuda
