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
  if (!cell_of_thread(in, b, unit)) return;
  const int64_t at = b * in.hidden_size + unit;
  const Compute hidden =
      in.initial_hidden == nullptr ? Compute(0) : widen(static_cast<const Storage*>(in.initial_hidden)[at]);
  const Compute cell = in.initial_cell == nullptr ? Compute(0) : static_cast<const Compute*>(in.initial_cell)[at];
  static_cast<Storage*>(step.loop.out.final_hidden)[at] = narrow<Storage>(hidden);
  static_cast<Compute*>(step.loop.out.final_cell)[at] = cell;
  const MaskKey key = mask_key(step.loop.layer.seed, step.masks.layer_direction);
  publish<Storage>(step, sequence_masks(step.masks, key, b, unit), b, row_length(in, b), unit, 0, hidden);
}

template <class Storage>
FUSEDREG_KERNEL void step_forward_plain(FUSEDREG_PARAMETER StepForward<ComputeOf<Storage>> step) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = step.loop.layer.in;
  int64_t b, unit;
  if (!cell_of_thread(in, b, unit)) return;
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
