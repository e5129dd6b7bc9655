// The step tier, forward, with recurrent batch normalisation (Cooijmans et al. 2017). A block has kColumns units of
// every row, so that the sums over the batch are its own; every value is read again by the thread that wrote it.
#pragma once

#include "moments.cuh"
#include "step_forward_cell.cuh"

namespace fusedreg::cuda {

// The moments of one unit's four gates over the `count` rows that reach the step, in two passes: the variance of what
// the mean has been taken from.
template <class Compute>
FUSEDREG_DEVICE void moments_of_recurrent_columns(const StepForward<Compute>& step, const ColumnShare& share,
                                                  int64_t count, Moments<Compute> (&moments)[4], Compute* shared) {
  const LayerInputs& in = step.loop.layer.in;
  if (!takes_batch_statistics(in.options, count)) {
    for (int gate = 0; gate < 4; ++gate) {
      if (share.rows == 0) continue;
      moments[gate] = recurrent_population<Compute>(step.loop.layer, step.s, gate * in.hidden_size + share.unit);
    }
    return;
  }
  Compute sums[4] = {0, 0, 0, 0}, squares[4] = {0, 0, 0, 0}, a[4];
  for (int64_t b = share.first; b < share.rows; b += share.stride) {
    if (!step_row(in, b, step.s).valid) continue;
    read_recurrent(step, b, share.unit, a);
    for (int gate = 0; gate < 4; ++gate) sums[gate] += a[gate];
  }
  column_sums(sums, shared);
  const Compute inverse = Compute(1) / static_cast<Compute>(count);
  for (int gate = 0; gate < 4; ++gate) moments[gate].mean = sums[gate] * inverse;
  for (int64_t b = share.first; b < share.rows; b += share.stride) {
    if (!step_row(in, b, step.s).valid) continue;
    read_recurrent(step, b, share.unit, a);
    for (int gate = 0; gate < 4; ++gate) {
      squares[gate] += (a[gate] - moments[gate].mean) * (a[gate] - moments[gate].mean);
    }
  }
  column_sums(squares, shared);
  for (int gate = 0; gate < 4; ++gate) moments[gate] = {moments[gate].mean, squares[gate] * inverse, false};
}

template <class Compute>
FUSEDREG_DEVICE Moments<Compute> moments_of_candidate_column(const StepForward<Compute>& step, const ColumnShare& share,
                                                             int64_t count, Compute own_sum, Compute* shared) {
  const LayerInputs& in = step.loop.layer.in;
  if (!takes_batch_statistics(in.options, count)) {
    return share.rows == 0 ? Moments<Compute>{} : cell_population<Compute>(step.loop.layer, step.s, share.unit);
  }
  Compute sum[1] = {own_sum}, squares[1] = {0};
  column_sums(sum, shared);
  const Compute inverse = Compute(1) / static_cast<Compute>(count);
  const Compute mean = sum[0] * inverse;
  for (int64_t b = share.first; b < share.rows; b += share.stride) {
    if (!step_row(in, b, step.s).valid) continue;
    const Compute difference = step.candidates[b * in.hidden_size + share.unit] - mean;
    squares[0] += difference * difference;
  }
  column_sums(squares, shared);
  return {mean, squares[0] * inverse, false};
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kMostStepThreads<ComputeOf<Storage>>, 1) void step_forward_batch_norm(
    FUSEDREG_PARAMETER StepForward<ComputeOf<Storage>> step) {
  using Compute = ComputeOf<Storage>;
  const LoopInputs& layer = step.loop.layer;
  const LayerInputs& in = layer.in;
  const LayerOutputs& out = step.loop.out;
  const int64_t H = in.hidden_size;
  const ColumnShare share = column_share(in);
  const int64_t unit = share.unit;
  Compute* shared = reinterpret_cast<Compute*>(dynamic_shared());

  Moments<Compute> recurrent[4];
  Compute scale[4] = {1, 1, 1, 1};
  const int64_t count = rows_running(in, share, step.s, shared);
  if (in.options.norm_recurrent) {
    moments_of_recurrent_columns(step, share, count, recurrent, shared);
    for (int gate = 0; gate < 4 && share.rows > 0; ++gate) {
      const int64_t column = gate * H + unit;
      if (share.writes_statistics()) {
        store_moments(out.recurrent_statistics, step.s, 4 * H, column, count > 0, recurrent[gate]);
      }
      scale[gate] =
          recurrent[gate].scale(in.norm_eps) * norm_parameter<Storage>(in.norm.recurrent_weight, column, Compute(1));
    }
  }
  Compute candidate_sum = 0;
  for (int64_t b = share.first; b < share.rows; b += share.stride) {
    const StepRow row = step_row(in, b, step.s);
    if (!row.valid) {
      pass_cell<Storage>(step, row, unit);
      continue;
    }
    Compute a[4], z[4];
    read_recurrent(step, b, unit, a);
    if (!step.kept_in_place) keep_recurrent(step, row, unit, a);
    read_terms(layer, row, unit, z);
    for (int gate = 0; gate < 4; ++gate) z[gate] += (a[gate] - recurrent[gate].mean) * scale[gate];
    const CellStart<Compute> start = start_cell<Storage>(step, row, unit);
    const CellEntry<Compute> entry = begin_cell(z, start.previous_cell, start.masks);
    if (in.options.norm_cell) {
      step.candidates[b * H + unit] = entry.candidate;
      step.output_gates[b * H + unit] = entry.gates.o;
      candidate_sum += entry.candidate;
    } else {
      end_cell<Storage>(step, row, unit, start, entry.gates.o, entry.candidate, entry.candidate);
    }
  }
  if (!in.options.norm_cell) return;

  const Moments<Compute> cell = moments_of_candidate_column(step, share, count, candidate_sum, shared);
  if (share.rows == 0) return;
  if (share.writes_statistics()) store_moments(out.cell_statistics, step.s, H, unit, count > 0, cell);
  const Compute cell_scale = cell.scale(in.norm_eps) * norm_parameter<Storage>(in.norm.cell_weight, unit, Compute(1));
  const Compute cell_shift = norm_parameter<Storage>(in.norm.cell_bias, unit, Compute(0));
  for (int64_t b = share.first; b < share.rows; b += share.stride) {
    const StepRow row = step_row(in, b, step.s);
    if (!row.valid) continue;
    const Compute candidate = step.candidates[b * H + unit];
    end_cell<Storage>(step, row, unit, start_cell<Storage>(step, row, unit), step.output_gates[b * H + unit], candidate,
                      (candidate - cell.mean) * cell_scale + cell_shift);
  }
}

}  // namespace fusedreg::cuda
