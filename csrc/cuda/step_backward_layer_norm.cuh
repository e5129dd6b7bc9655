// The step tier, backward, with layer normalisation. For y = gain x_hat + shift over the n values of a row:
//
//   dx = (g - mean(g) - x_hat mean(g x_hat)) / deviation,   g = gain dy,   x_hat = (x - mean) / deviation
//
// A block has one row. Every value is read again by the thread that wrote it.
#pragma once

#include "moments.cuh"
#include "step_backward_cell.cuh"

namespace fusedreg::cuda {

// One norm of one row on its way back.
template <class Compute>
struct RowNorm {
  Compute mean = 0, scale = 1, spread = 1;
  Compute sums[2] = {0, 0};  // of g, and of g x_hat; later their means over the row

  RowNorm() = default;
  FUSEDREG_DEVICE RowNorm(const LayerInputs& in, const void* statistics, const StepRow& row) {
    const Moments<Compute> moments = load_moments<Compute>(statistics, row.t, in.rows, row.b, false);
    mean = moments.mean;
    scale = moments.scale(in.norm_eps);
    spread = moments.spread_scale(in.norm_eps);
  }
  FUSEDREG_DEVICE Compute normalised(Compute x) const { return (x - mean) * spread; }
  FUSEDREG_DEVICE void add(Compute grad, Compute x_hat) {
    sums[0] += grad;
    sums[1] += grad * x_hat;
  }
  FUSEDREG_DEVICE void take_means(int64_t values, Compute* shared) {
    block_sums(sums, shared);
    for (Compute& sum : sums) sum *= Compute(1) / static_cast<Compute>(values);
  }
  FUSEDREG_DEVICE Compute through(Compute grad, Compute x_hat) const {
    return scale * (grad - sums[0] - x_hat * sums[1]);
  }
};

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kMostStepThreads<ComputeOf<Storage>>, 1) void step_backward_layer_norm(
    FUSEDREG_PARAMETER StepBackward<ComputeOf<Storage>> step) {
  using Compute = ComputeOf<Storage>;
  const BackwardLoop& loop = step.loop;
  const LayerInputs& in = loop.layer.in;
  const int64_t H = in.hidden_size;
  Compute* shared = reinterpret_cast<Compute*>(dynamic_shared());
  const StepRow row = step_row(in, block_index(), step.s);
  const int first = thread_index(), stride = block_threads();
  if (!row.valid) {
    for (int64_t unit = first; unit < H; unit += stride) pass_gradients<Storage>(step, row, unit);
    return;
  }
  RowNorm<Compute> recurrent, cell;
  if (in.options.norm_recurrent) recurrent = RowNorm<Compute>(in, loop.saved.recurrent_statistics, row);
  if (in.options.norm_cell) cell = RowNorm<Compute>(in, loop.saved.cell_statistics, row);
  const Compute* kept_a = static_cast<const Compute*>(loop.gates);
  const auto recurrent_gain = [&](int gate, int64_t unit) {
    return norm_parameter<Storage>(in.norm.recurrent_weight, gate * H + unit, Compute(1));
  };
  // Adds one unit's dz to the sums of N_a.
  const auto add_recurrent = [&](const CellDeparting<Compute>& departing, int64_t unit) {
    if (!in.options.norm_recurrent) return;
    Compute a[4];
    read_gates(kept_a, row.results, H, unit, a);
    for (int gate = 0; gate < 4; ++gate) {
      recurrent.add(departing.pre_activations[gate] * recurrent_gain(gate, unit), recurrent.normalised(a[gate]));
    }
  };

  // To the edge of N_c, and without it to z.
  for (int64_t unit = first; unit < H; unit += stride) {
    Compute a[4], z[4];
    read_gates(kept_a, row.results, H, unit, a);
    read_terms(loop.layer, row, unit, z);
    for (int gate = 0; gate < 4; ++gate) z[gate] += recurrent.normalised(a[gate]) * recurrent_gain(gate, unit);
    CellTrace<Compute> trace = trace_cell<Storage>(step, row, unit, activated(z));
    if (!in.options.norm_cell) {
      const Compute through_output = leave_output_of<Storage>(step, row, unit, trace, trace.candidate);
      add_recurrent(release_cell<Storage>(step, row, unit, trace, through_output), unit);
      continue;
    }
    const Compute gain = norm_parameter<Storage>(in.norm.cell_weight, unit, Compute(1));
    const Compute x_hat = cell.normalised(trace.candidate);
    const Compute grad = leave_output_of<Storage>(
        step, row, unit, trace, x_hat * gain + norm_parameter<Storage>(in.norm.cell_bias, unit, Compute(0)));
    static_cast<Compute*>(loop.grad_cell_normalised)[row.results * H + unit] = grad;
    static_cast<Compute*>(loop.cell_normalised)[row.results * H + unit] = x_hat;
    // The product goes through memory, rounded: over a single unit its mean is subtracted from it, and the two must
    // cancel to exactly 0, which a product fused into the subtraction would not.
    const Compute scaled = grad * gain;
    cell.add(scaled, x_hat);
    keep_trace(step, row.b, unit, trace, scaled);
  }

  // Through N_c and the cell to z.
  if (in.options.norm_cell) {
    cell.take_means(H, shared);
    for (int64_t unit = first; unit < H; unit += stride) {
      Compute scaled;
      const CellTrace<Compute> trace = kept_trace(step, row.b, unit, scaled);
      const Compute x_hat = static_cast<const Compute*>(loop.cell_normalised)[row.results * H + unit];
      add_recurrent(release_cell<Storage>(step, row, unit, trace, cell.through(scaled, x_hat)), unit);
    }
  }

  // Through N_a.
  if (!in.options.norm_recurrent) return;
  recurrent.take_means(4 * H, shared);
  for (int64_t unit = first; unit < H; unit += stride) {
    Compute a[4], grads[4];
    read_gates(kept_a, row.results, H, unit, a);
    read_gates(static_cast<const Compute*>(loop.grad_gates), row.results, H, unit, grads);
    for (int gate = 0; gate < 4; ++gate) {
      grads[gate] = recurrent.through(grads[gate] * recurrent_gain(gate, unit), recurrent.normalised(a[gate]));
    }
    write_recurrent_gradient<Storage>(step, row, unit, grads);
  }
}

}  // namespace fusedreg::cuda
