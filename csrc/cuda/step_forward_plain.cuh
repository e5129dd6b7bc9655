// The step tier, forward: the kernel that starts the loop, and the fused kernel of a step without a norm.
#pragma once

#include "step_forward_cell.cuh"

namespace fusedreg::cuda {

// The states before the first step, and what its product reads.
template <class Storage>
FUSEDREG_KERNEL void step_forward_start(FUSEDREG_PARAMETER StepForward<ComputeOf<Storage>> step) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = step.loop.layer.in;
  int64_t b, unit;
  if (!unit_of_thread(most_units(in), b, unit)) return;
  if (unit < in.hidden_size) {
    const int64_t at = b * in.hidden_size + unit;
    const Compute cell = in.initial_cell == nullptr ? Compute(0) : static_cast<const Compute*>(in.initial_cell)[at];
    static_cast<Compute*>(step.loop.out.final_cell)[at] = cell;
  }
  if (unit >= in.projected_size) return;
  const int64_t at = b * in.projected_size + unit;
  const Compute hidden =
      in.initial_hidden == nullptr ? Compute(0) : widen(static_cast<const Storage*>(in.initial_hidden)[at]);
  static_cast<Storage*>(step.loop.out.final_hidden)[at] = narrow<Storage>(hidden);
  const MaskKey key = row_key(step.loop.layer, step.masks.layer_direction, b);
  publish<Storage>(step, sequence_masks(step.masks, key, unit), b, row_length(in, b), unit, 0, hidden);
}

// With a projection, after its product: h and y of a step, from u W_hr^T.
template <class Storage>
FUSEDREG_KERNEL void step_forward_projected(FUSEDREG_PARAMETER StepForward<ComputeOf<Storage>> step) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = step.loop.layer.in;
  const LayerOutputs& out = step.loop.out;
  int64_t b, unit;
  if (!unit_of_thread(in.projected_size, b, unit)) return;
  const StepRow row = step_row(in, b, step.s);
  const int64_t at = b * in.projected_size + unit, result = row.results * in.projected_size + unit;
  if (!row.valid) return write_hidden<Storage>(out, result, Compute(0), Compute(0));
  const MaskKey key = row_key(step.loop.layer, step.masks.layer_direction, b);
  const SequenceMasks<Compute> sequence = sequence_masks(step.masks, key, unit);
  const StepMasks<Compute> masks = step_masks(step.masks, key, sequence, unit, row.t);
  Storage* const carried = static_cast<Storage*>(out.final_hidden) + at;
  const bool from_zero = begins_from_zero(in, b, row.length, step.s);
  const Compute candidate = sum_of_parts<Storage>(step.projected, at, in.rows * in.projected_size);
  const HiddenExit<Compute> exit =
      finish_hidden<Storage>(in.options, masks, from_zero ? Compute(0) : widen(*carried), candidate);
  write_hidden<Storage>(out, result, exit.hidden, exit.output);
  *carried = narrow<Storage>(exit.hidden);
  publish<Storage>(step, sequence, b, row.length, unit, step.s + 1, exit.hidden);
}

template <class Storage>
FUSEDREG_KERNEL void step_forward_plain(FUSEDREG_PARAMETER StepForward<ComputeOf<Storage>> step) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = step.loop.layer.in;
  int64_t b, unit;
  if (!unit_of_thread(in.hidden_size, b, unit)) return;
  const StepRow row = step_row(in, b, step.s);
  if (!row.valid) return pass_cell<Storage>(step, row, unit);
  Compute a[4], z[4];
  read_recurrent(step, b, unit, a);
  read_terms(step.loop.layer, row, unit, z);
  for (int gate = 0; gate < 4; ++gate) z[gate] += a[gate];
  const CellStart<Compute> start = start_cell<Storage>(step, row, unit);
  const CellEntry<Compute> entry = begin_cell(z, start.previous_cell, start.masks);
  write_activated_gates<Storage>(step.loop.out.gates, row.results, in.hidden_size, unit, entry.gates);
  end_cell<Storage>(step, row, unit, start, entry.gates.o, entry.candidate, entry.candidate);
}

}  // namespace fusedreg::cuda
