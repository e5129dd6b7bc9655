// The step tier, backward: the fused kernel of a step without a norm, and the kernel that ends the loop.
#pragma once

#include "step_backward_cell.cuh"

namespace fusedreg::cuda {

template <class Storage>
FUSEDREG_KERNEL void step_backward_plain(FUSEDREG_PARAMETER StepBackward<ComputeOf<Storage>> step) {
  using Compute = ComputeOf<Storage>;
  const LoopInputs& layer = step.loop.layer;
  int64_t b, unit;
  if (!unit_of_thread(layer.in.hidden_size, b, unit)) return;
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
  const Compute through_output = leave_output_of<Storage>(step, row, unit, trace, trace.candidate);
  release_cell<Storage>(step, row, unit, trace, through_output);
}

// With a projection, before its product: what reaches u W_hr^T of a step.
template <class Storage>
FUSEDREG_KERNEL void step_backward_projected(FUSEDREG_PARAMETER StepBackward<ComputeOf<Storage>> step) {
  using Compute = ComputeOf<Storage>;
  const BackwardLoop& loop = step.loop;
  const LayerInputs& in = loop.layer.in;
  int64_t b, unit;
  if (!unit_of_thread(in.projected_size, b, unit)) return;
  const StepRow row = step_row(in, b, step.s);
  const int64_t at = b * in.projected_size + unit;
  ZonedGradients<Compute> hidden{0, 0};
  if (row.valid) {
    const MaskKey key = row_key(loop.layer, step.masks.layer_direction, b);
    const SequenceMasks<Compute> sequence = sequence_masks(step.masks, key, unit);
    const StepMasks<Compute> masks = step_masks(step.masks, key, sequence, unit, row.t);
    hidden = trace_hidden<Storage>(step, row, unit, sequence, masks);
    if (step.masks.zones_hidden) {
      step.grad_hidden[at] = begins_from_zero(in, b, row.length, step.s) ? Compute(0) : hidden.previous;
    }
  } else {
    pass_hidden_gradients<Storage>(step, row, unit);
  }
  store_parts<Storage>(step.projected_of_step, at, in.rows * in.projected_size, hidden.candidate);
  if (loop.grad_projected == nullptr) return;
  const GroupedRow place = grouped_row(in, in.options.gradient_groups, b);
  static_cast<Storage*>(loop.grad_projected)[place.at(row.t) * in.projected_size + unit] =
      narrow<Storage>(hidden.candidate);
}

// What is left after the first step, or of rows without any, is the gradient of the initial states.
template <class Storage>
FUSEDREG_KERNEL void step_backward_end(FUSEDREG_PARAMETER StepBackward<ComputeOf<Storage>> step) {
  using Compute = ComputeOf<Storage>;
  const BackwardLoop& loop = step.loop;
  const LayerInputs& in = loop.layer.in;
  int64_t b, unit;
  if (!unit_of_thread(most_units(in), b, unit)) return;
  const int64_t length = row_length(in, b);
  if (loop.grad_initial_hidden != nullptr && unit < in.projected_size) {
    const SequenceMasks<Compute> sequence =
        sequence_masks(step.masks, row_key(loop.layer, step.masks.layer_direction, b), unit);
    static_cast<Storage*>(loop.grad_initial_hidden)[b * in.projected_size + unit] =
        narrow<Storage>(read_hidden<Storage>(step, sequence, b, length, unit));
  }
  if (loop.grad_initial_cell != nullptr && unit < in.hidden_size) {
    static_cast<Compute*>(loop.grad_initial_cell)[b * in.hidden_size + unit] = read_cell(step, b, length, unit);
  }
}

}  // namespace fusedreg::cuda
