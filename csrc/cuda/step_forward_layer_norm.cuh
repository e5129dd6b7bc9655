// The step tier, forward, with layer normalisation (Ba et al. 2016): over all 4H of a row for the recurrent term, over
// H for the cell. A block has one row, so that the sums are its own; every value is read again by the thread that wrote
// it.
#pragma once

#include "moments.cuh"
#include "step_forward_cell.cuh"

namespace fusedreg::cuda {

// In two passes: the variance of what the mean has been taken from.
template <class Compute>
FUSEDREG_DEVICE Moments<Compute> moments_of_recurrent_row(const StepForward<Compute>& step, int64_t b,
                                                          Compute* shared) {
  const int64_t H = step.loop.layer.in.hidden_size;
  const Compute inverse = Compute(1) / static_cast<Compute>(4 * H);
  Compute sum[1] = {0}, squares[1] = {0}, a[4];
  for (int64_t unit = thread_index(); unit < H; unit += block_threads()) {
    read_recurrent(step, b, unit, a);
    sum[0] += (a[0] + a[1]) + (a[2] + a[3]);
  }
  block_sums(sum, shared);
  const Compute mean = sum[0] * inverse;
  for (int64_t unit = thread_index(); unit < H; unit += block_threads()) {
    read_recurrent(step, b, unit, a);
    for (int gate = 0; gate < 4; ++gate) squares[0] += (a[gate] - mean) * (a[gate] - mean);
  }
  block_sums(squares, shared);
  return {mean, squares[0] * inverse, false};
}

template <class Compute>
FUSEDREG_DEVICE Moments<Compute> moments_of_candidate_row(const Compute* candidates, int64_t H, Compute own_sum,
                                                          Compute* shared) {
  const Compute inverse = Compute(1) / static_cast<Compute>(H);
  Compute sum[1] = {own_sum}, squares[1] = {0};
  block_sums(sum, shared);
  const Compute mean = sum[0] * inverse;
  for (int64_t unit = thread_index(); unit < H; unit += block_threads()) {
    squares[0] += (candidates[unit] - mean) * (candidates[unit] - mean);
  }
  block_sums(squares, shared);
  return {mean, squares[0] * inverse, false};
}

// A row that is past its end.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE void pass_row(const StepForward<Compute>& step, const StepRow& row) {
  const LayerInputs& in = step.loop.layer.in;
  for (int64_t unit = thread_index(); unit < in.hidden_size; unit += block_threads()) {
    pass_cell<Storage>(step, row, unit);
  }
  if (thread_index() != 0) return;
  store_moments(step.loop.out.recurrent_statistics, row.t, in.rows, row.b, false, Moments<Compute>{});
  store_moments(step.loop.out.cell_statistics, row.t, in.rows, row.b, false, Moments<Compute>{});
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kMostStepThreads<ComputeOf<Storage>>, 1) void step_forward_layer_norm(
    FUSEDREG_PARAMETER StepForward<ComputeOf<Storage>> step) {
  using Compute = ComputeOf<Storage>;
  const LoopInputs& layer = step.loop.layer;
  const LayerInputs& in = layer.in;
  const LayerOutputs& out = step.loop.out;
  const int64_t H = in.hidden_size;
  Compute* shared = reinterpret_cast<Compute*>(dynamic_shared());
  const StepRow row = step_row(in, block_index(), step.s);
  if (!row.valid) return pass_row<Storage>(step, row);

  Compute mean = 0, scale = 1;
  if (in.options.norm_recurrent) {
    const Moments<Compute> recurrent = moments_of_recurrent_row(step, row.b, shared);
    mean = recurrent.mean, scale = recurrent.scale(in.norm_eps);
    if (thread_index() == 0) store_moments(out.recurrent_statistics, row.t, in.rows, row.b, true, recurrent);
  }
  Compute* candidates = step.candidates + row.b * H;
  Compute* output_gates = step.output_gates + row.b * H;
  Compute candidate_sum = 0;
  for (int64_t unit = thread_index(); unit < H; unit += block_threads()) {
    Compute a[4], z[4];
    read_recurrent(step, row.b, unit, a);
    if (!step.kept_in_place) keep_recurrent(step, row, unit, a);
    read_terms(layer, row, unit, z);
    for (int gate = 0; gate < 4; ++gate) {
      z[gate] +=
          (a[gate] - mean) * scale * norm_parameter<Storage>(in.norm.recurrent_weight, gate * H + unit, Compute(1));
    }
    const CellStart<Compute> start = start_cell<Storage>(step, row, unit);
    const CellEntry<Compute> entry = begin_cell(z, start.previous_cell, start.masks);
    if (in.options.norm_cell) {
      candidates[unit] = entry.candidate;
      output_gates[unit] = entry.gates.o;
      candidate_sum += entry.candidate;
    } else {
      end_cell<Storage>(step, row, unit, start, entry.gates.o, entry.candidate, entry.candidate);
    }
  }
  if (!in.options.norm_cell) return;

  const Moments<Compute> cell = moments_of_candidate_row<Compute>(candidates, H, candidate_sum, shared);
  if (thread_index() == 0) store_moments(out.cell_statistics, row.t, in.rows, row.b, true, cell);
  const Compute cell_scale = cell.scale(in.norm_eps);
  for (int64_t unit = thread_index(); unit < H; unit += block_threads()) {
    const Compute candidate = candidates[unit];
    const Compute normalised =
        (candidate - cell.mean) * cell_scale * norm_parameter<Storage>(in.norm.cell_weight, unit, Compute(1)) +
        norm_parameter<Storage>(in.norm.cell_bias, unit, Compute(0));
    end_cell<Storage>(step, row, unit, start_cell<Storage>(step, row, unit), output_gates[unit], candidate, normalised);
  }
}

}  // namespace fusedreg::cuda
