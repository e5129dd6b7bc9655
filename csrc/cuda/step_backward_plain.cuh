// The step tier, backward: the fused kernel of a step without a norm, and the kernel that ends the loop.
#pragma once

#include "step_backward_cell.cuh"

namespace fusedreg::cuda {

template <class Storage>
FUSEDREG_KERNEL void step_backward_plain(FUSEDREG_PARAMETER StepBackward<ComputeOf<Storage>> step) {
  using Compute = ComputeOf<Storage>;
  const LoopInputs& layer = step.loop.layer;
  int64_t b, unit;
  if (!cell_of_thread(layer.in, b, unit)) return;
  const StepRow row = step_row(layer.in, b, step.s);
  if (!row.valid) return pass_gradients<Storage>(step, row, unit);
  Gates<Compute> gates;
  if (step.loop.activated) {
    gates = read_activated_gates<Storage>(step.loop.gates, row.results, layer.in.hidden_size, unit);
  } else {
    Compute a[4], z[4];
    read_gates(static_cast<const Compute*>(step.loop.gates), row.results, layer.in.hidden_size, unit, a);
    read_terms(layer, row, unit, z);
    for (int gate = 0; gate < 4; ++gate) z[gate] += a[gate];
    gates = activated(z);
  }
  CellTrace<Compute> trace = trace_cell<Storage>(step, row, unit, gates);
  const Compute through_output = leave_output(trace, trace.candidate);
  release_cell<Storage>(step, row, unit, trace, through_output);
}

// What is left after the first step, or of rows without any, is the gradient of the initial states.
template <class Storage>
FUSEDREG_KERNEL void step_backward_end(FUSEDREG_PARAMETER StepBackward<ComputeOf<Storage>> step) {
  using Compute = ComputeOf<Storage>;
  const BackwardLoop& loop = step.loop;
  const LayerInputs& in = loop.layer.in;
  int64_t b, unit;
  if (!cell_of_thread(in, b, unit)) return;
  const MaskKey key = mask_key(loop.layer.seed, step.masks.layer_direction);
  const CellIncoming<Compute> left =
      read_incoming<Storage>(step, sequence_masks(step.masks, key, b, unit), b, row_length(in, b), unit);
  const int64_t at = b * in.hidden_size + unit;
  if (loop.grad_initial_hidden != nullptr) {
    static_cast<Storage*>(loop.grad_initial_hidden)[at] = narrow<Storage>(left.hidden);
  }
  if (loop.grad_initial_cell != nullptr) static_cast<Compute*>(loop.grad_initial_cell)[at] = left.cell;
}

}  // namespace fusedreg::cuda
