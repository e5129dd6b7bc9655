// The step tier, backward, with recurrent batch normalisation. For y = gain x_hat + shift over the n rows of a step:
//
//   dx = gain / deviation (dy - mean(dy) - x_hat mean(dy x_hat)),   x_hat = (x - mean) / deviation
//
// and without the two means where the statistics were not the batch's own but constants. Only rows that reach the step
// take part. A block has kColumns units of every row; every value is read again by the thread that wrote it.
#pragma once

#include "moments.cuh"
#include "step_backward_cell.cuh"

namespace fusedreg::cuda {

// One norm of one column on its way back.
template <class Compute>
struct ColumnNorm {
  Compute mean = 0, spread = 1, gain = 1;
  Compute factor = 1;  // gain / deviation

  ColumnNorm() = default;
  FUSEDREG_DEVICE ColumnNorm(const LayerInputs& in, const Moments<Compute>& moments, Compute given_gain)
      : mean(moments.mean),
        spread(moments.spread_scale(in.norm_eps)),
        gain(given_gain),
        factor(moments.scale(in.norm_eps) * given_gain) {}
  FUSEDREG_DEVICE Compute normalised(Compute x) const { return (x - mean) * spread; }
};

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kMostStepThreads<ComputeOf<Storage>>, 1) void step_backward_batch_norm(
    FUSEDREG_PARAMETER StepBackward<ComputeOf<Storage>> step) {
  using Compute = ComputeOf<Storage>;
  const BackwardLoop& loop = step.loop;
  const LayerInputs& in = loop.layer.in;
  const int64_t H = in.hidden_size;
  const ColumnShare share = column_share(in);
  const int64_t unit = share.unit;
  Compute* shared = reinterpret_cast<Compute*>(dynamic_shared());
  const int64_t count = rows_running(in, share, step.s, shared);
  const bool constant = !takes_batch_statistics(in.options, count);
  // What a sum is multiplied with to become the mean that is subtracted.
  const Compute inverse = constant ? Compute(0) : Compute(1) / static_cast<Compute>(count);

  ColumnNorm<Compute> recurrent[4], cell;
  Compute cell_shift = 0;
  if (count > 0 && share.rows > 0) {
    for (int gate = 0; gate < 4 && in.options.norm_recurrent; ++gate) {
      const int64_t column = gate * H + unit;
      recurrent[gate] = ColumnNorm<Compute>(
          in, load_moments<Compute>(loop.saved.recurrent_statistics, step.s, 4 * H, column, constant),
          norm_parameter<Storage>(in.norm.recurrent_weight, column, Compute(1)));
    }
    if (in.options.norm_cell) {
      cell = ColumnNorm<Compute>(in, load_moments<Compute>(loop.saved.cell_statistics, step.s, H, unit, constant),
                                 norm_parameter<Storage>(in.norm.cell_weight, unit, Compute(1)));
      cell_shift = norm_parameter<Storage>(in.norm.cell_bias, unit, Compute(0));
    }
  }
  const Compute* kept_a = static_cast<const Compute*>(loop.gates);
  Compute recurrent_sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};  // of dz, then of dz x_hat
  const auto add_recurrent = [&](const CellDeparting<Compute>& departing, const StepRow& row) {
    if (!in.options.norm_recurrent) return;
    Compute a[4];
    read_gates(kept_a, row.results, H, unit, a);
    for (int gate = 0; gate < 4; ++gate) {
      recurrent_sums[gate] += departing.pre_activations[gate];
      recurrent_sums[4 + gate] += departing.pre_activations[gate] * recurrent[gate].normalised(a[gate]);
    }
  };

  // To the edge of N_c, and without it to z.
  Compute cell_sums[2] = {0, 0};
  for (int64_t b = share.first; b < share.rows; b += share.stride) {
    const StepRow row = step_row(in, b, step.s);
    if (!row.valid) {
      pass_gradients<Storage>(step, row, unit);
      continue;
    }
    Compute a[4], z[4];
    read_gates(kept_a, row.results, H, unit, a);
    read_terms(loop.layer, row, unit, z);
    for (int gate = 0; gate < 4; ++gate) z[gate] += recurrent[gate].normalised(a[gate]) * recurrent[gate].gain;
    CellTrace<Compute> trace = trace_cell<Storage>(step, row, unit, activated(z));
    if (!in.options.norm_cell) {
      const Compute through_output = leave_output_of<Storage>(step, row, unit, trace, trace.candidate);
      add_recurrent(release_cell<Storage>(step, row, unit, trace, through_output), row);
      continue;
    }
    const Compute x_hat = cell.normalised(trace.candidate);
    const Compute grad = leave_output_of<Storage>(step, row, unit, trace, x_hat * cell.gain + cell_shift);
    static_cast<Compute*>(loop.grad_cell_normalised)[row.results * H + unit] = grad;
    static_cast<Compute*>(loop.cell_normalised)[row.results * H + unit] = x_hat;
    cell_sums[0] += grad;
    cell_sums[1] += grad * x_hat;
    keep_trace(step, b, unit, trace, grad);
  }

  // Through N_c and the cell to z.
  if (in.options.norm_cell) {
    column_sums(cell_sums, shared);
    for (Compute& sum : cell_sums) sum *= inverse;
    for (int64_t b = share.first; b < share.rows; b += share.stride) {
      const StepRow row = step_row(in, b, step.s);
      if (!row.valid) continue;
      Compute grad;
      const CellTrace<Compute> trace = kept_trace(step, b, unit, grad);
      const Compute x_hat = static_cast<const Compute*>(loop.cell_normalised)[row.results * H + unit];
      const Compute through_norm = cell.factor * (grad - cell_sums[0] - x_hat * cell_sums[1]);
      add_recurrent(release_cell<Storage>(step, row, unit, trace, through_norm), row);
    }
  }

  // Through N_a.
  if (!in.options.norm_recurrent) return;
  column_sums(recurrent_sums, shared);
  for (Compute& sum : recurrent_sums) sum *= inverse;
  for (int64_t b = share.first; b < share.rows; b += share.stride) {
    const StepRow row = step_row(in, b, step.s);
    if (!row.valid) continue;
    Compute a[4], grads[4];
    read_gates(kept_a, row.results, H, unit, a);
    read_gates(static_cast<const Compute*>(loop.grad_gates), row.results, H, unit, grads);
    for (int gate = 0; gate < 4; ++gate) {
      const Compute x_hat = recurrent[gate].normalised(a[gate]);
      grads[gate] = recurrent[gate].factor * (grads[gate] - recurrent_sums[gate] - x_hat * recurrent_sums[4 + gate]);
    }
    write_recurrent_gradient<Storage>(step, row, unit, grads);
  }
}

}  // namespace fusedreg::cuda
