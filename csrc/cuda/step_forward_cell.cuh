// The step tier, forward: what its kernels are given, and one cell at one step between the library's products.
#pragma once

#include "step_rows.cuh"

namespace fusedreg::cuda {

// Given to each of the kernels. The carried states are kept where they have to end up: in final_hidden and final_cell.
template <class Compute>
struct StepForward {
  ForwardLoop loop;
  LoopMasks<Compute> masks;
  void* published;           // h as the next product reads it: [1 or 4 copies][B][P] storage
  const Compute* recurrent;  // a of this step but for masks.recurrent_scale, (B, 4H)
  bool kept_in_place;        // a norm's a: the product has put it where it is kept
  Compute* candidates;       // (B, H), for a norm of the cell: between the pass that takes its statistics
  Compute* output_gates;     // (B, H)  and the one that uses them
  void* unprojected;         // with a projection: u = o tanh(N_c(candidate)), [parts][B][H] storage; else null
  const Compute* projected;  // and the parts' u W_hr^T, [parts][B][P]
  int64_t s;
};

template <class Compute>
FUSEDREG_DEVICE void read_recurrent(const StepForward<Compute>& step, int64_t b, int64_t unit, Compute (&a)[4]) {
  read_gates(step.recurrent, b, step.loop.layer.in.hidden_size, unit, a);
  for (int gate = 0; gate < 4; ++gate) a[gate] *= step.masks.recurrent_scale;
}

template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE void publish(const StepForward<Compute>& step, const SequenceMasks<Compute>& sequence, int64_t b,
                             int64_t length, int64_t unit, int64_t next_step, Compute hidden) {
  const LayerInputs& in = step.loop.layer.in;
  const bool from_zero = begins_from_zero(in, b, length, next_step);
  Storage* to = static_cast<Storage*>(step.published) + b * in.projected_size + unit;
  for (int copy = 0; copy < 4; ++copy) {  // a fixed count keeps the masks in registers
    if (copy >= step.masks.hidden_copies()) break;
    to[copy * in.rows * in.projected_size] = published_hidden<Storage>(hidden, sequence.hidden[copy], from_zero);
  }
}

// The states that a cell starts from, and the masks of its step.
template <class Compute>
struct CellStart {
  SequenceMasks<Compute> sequence;
  StepMasks<Compute> masks;
  Compute previous_cell, previous_hidden;
};

template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE CellStart<Compute> start_cell(const StepForward<Compute>& step, const StepRow& row, int64_t unit) {
  const LayerInputs& in = step.loop.layer.in;
  const MaskKey key = row_key(step.loop.layer, step.masks.layer_direction, row.b);
  CellStart<Compute> start;
  start.sequence = sequence_masks(step.masks, key, unit);
  start.masks = step_masks(step.masks, key, start.sequence, unit, row.t);
  start.previous_cell = start.previous_hidden = 0;
  if (!begins_from_zero(in, row.b, row.length, step.s)) {
    const int64_t at = row.b * in.hidden_size + unit;
    start.previous_cell = static_cast<const Compute*>(step.loop.out.final_cell)[at];
    if (step.masks.zones_hidden && step.unprojected == nullptr) {
      start.previous_hidden = widen(static_cast<const Storage*>(step.loop.out.final_hidden)[at]);
    }
  }
  return start;
}

// From the candidate and what N_c made of it to everything that is carried, returned and read by the next product.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE void end_cell(const StepForward<Compute>& step, const StepRow& row, int64_t unit,
                              const CellStart<Compute>& start, Compute output_gate, Compute candidate,
                              Compute normalised) {
  const LayerInputs& in = step.loop.layer.in;
  const LayerOutputs& out = step.loop.out;
  const CellExit<Compute> exit = finish_cell<Storage>(in.options, start.masks, output_gate, start.previous_cell,
                                                      start.previous_hidden, candidate, normalised);
  const int64_t at = row.b * in.hidden_size + unit, result = row.results * in.hidden_size + unit;
  static_cast<Compute*>(out.final_cell)[at] = exit.cell;
  write_cell(out, result, exit.cell);
  if (step.unprojected != nullptr) {
    return store_parts<Storage>(step.unprojected, at, in.rows * in.hidden_size, output_gate * tanh(normalised));
  }
  write_hidden<Storage>(out, result, exit.hidden, exit.output);
  static_cast<Storage*>(out.final_hidden)[at] = narrow<Storage>(exit.hidden);
  publish<Storage>(step, start.sequence, row.b, row.length, unit, step.s + 1, exit.hidden);
}

// With a norm the raw pre-activations are kept.
template <class Compute>
FUSEDREG_DEVICE void keep_recurrent(const StepForward<Compute>& step, const StepRow& row, int64_t unit,
                                    const Compute (&a)[4]) {
  if (step.loop.out.gates == nullptr) return;
  write_gates(static_cast<Compute*>(step.loop.out.gates), row.results, step.loop.layer.in.hidden_size, unit, a);
}

// The same for a row that is past its end: its states stay, its results are zeros.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE void pass_cell(const StepForward<Compute>& step, const StepRow& row, int64_t unit) {
  const LayerInputs& in = step.loop.layer.in;
  const LayerOutputs& out = step.loop.out;
  const int64_t H = in.hidden_size, at = row.results * H + unit;
  write_cell(out, at, Compute(0));
  if (step.unprojected == nullptr) write_hidden<Storage>(out, at, Compute(0), Compute(0));
  if (in.options.norm == NormKind::None) {
    if (out.gates == nullptr) return;
    Kept<Storage>* gates = static_cast<Kept<Storage>*>(out.gates) + row.results * 4 * H + unit;
    for (int gate = 0; gate < 4; ++gate) gates[gate * H] = 0;
  } else {
    const Compute nothing[4] = {0, 0, 0, 0};
    keep_recurrent(step, row, unit, nothing);
  }
}

}  // namespace fusedreg::cuda
