// The step tier, backward: what its kernels are given, and one cell at one step between the library's products.
#pragma once

#include "row_groups.h"
#include "step_rows.cuh"

namespace fusedreg::cuda {

// What is kept of a cell between the pass that takes the sums of N_c and the one that uses them: its trace, and the
// gradient of N_c's result times the gain. [field][B][H].
constexpr int kTraceFields = 13;
constexpr int kKeptFields = kTraceFields + 1;

// Given to each of the kernels. What a row carries from one step to the one before: dc; of dh what zoneout passes by,
// and the product of da with the weight. With a projection a kernel of its own takes dh through zoneout to what reaches
// u W_hr^T, and the kernel of the cells starts from the product of that with W_hr.
template <class Compute>
struct StepBackward {
  BackwardLoop loop;
  LoopMasks<Compute> masks;
  const Compute* product;   // da W_hh of step s + 1: [1, or by gates where the masks are untied: 4][B][P]
  Compute* grad_hidden;     // (B, P), used with zoneout of the hidden state
  Compute* grad_cell;       // (B, H)
  void* recurrent_of_step;  // (B, 4H) storage: da of this step, where loop.grad_recurrent has its rows at several t
  Compute* kept;
  // With a projection, else null: what reaches u W_hr^T of this step, [parts][B][P] storage, and the parts' products
  // with W_hr, [parts][B][H].
  void* projected_of_step;
  const Compute* grad_unprojected;
  int64_t s;  // -1: what is left is the initial states'
};

// What reaches h_s from the steps after s, or, in a row's last step, from outside.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE Compute read_hidden(const StepBackward<Compute>& step, const SequenceMasks<Compute>& sequence,
                                    int64_t b, int64_t length, int64_t unit) {
  const BackwardLoop& loop = step.loop;
  const LayerInputs& in = loop.layer.in;
  const int64_t at = b * in.projected_size + unit, next = step.s + 1;
  if (next >= length) {
    const Storage* const given = static_cast<const Storage*>(loop.grad_final_hidden);
    return given == nullptr ? Compute(0) : widen(given[at]);
  }
  if (begins_from_zero(in, b, length, next)) return 0;  // nothing passes a reset
  Compute hidden = 0;
  for (int copy = 0; copy < 4; ++copy) {  // a fixed count keeps the masks in registers
    if (copy >= step.masks.hidden_copies()) break;
    hidden += sequence.hidden[copy] * step.product[copy * in.rows * in.projected_size + at];
  }
  hidden *= step.masks.recurrent_scale;
  return step.masks.zones_hidden ? hidden + step.grad_hidden[at] : hidden;
}

// The same of c_s. Before a reset 0 has been carried.
template <class Compute>
FUSEDREG_DEVICE Compute read_cell(const StepBackward<Compute>& step, int64_t b, int64_t length, int64_t unit) {
  const int64_t at = b * step.loop.layer.in.hidden_size + unit;
  if (step.s + 1 < length) return step.grad_cell[at];
  const Compute* const given = static_cast<const Compute*>(step.loop.grad_final_cell);
  return given == nullptr ? Compute(0) : given[at];
}

// Row `row` at step s: what reaches h and y, through zoneout. `masks` and `sequence` are of a unit of h.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE ZonedGradients<Compute> trace_hidden(const StepBackward<Compute>& step, const StepRow& row,
                                                     int64_t unit, const SequenceMasks<Compute>& sequence,
                                                     const StepMasks<Compute>& masks) {
  const BackwardLoop& loop = step.loop;
  const LayerInputs& in = loop.layer.in;
  CellIncoming<Compute> incoming{0, read_hidden<Storage>(step, sequence, row.b, row.length, unit), 0};
  if (loop.grad_output != nullptr) {
    incoming.output = widen(static_cast<const Storage*>(
        loop.grad_output)[row.t * loop.grad_output_step_stride + row.b * loop.grad_output_row_stride + unit]);
  }
  if (loop.grad_hidden_probe != nullptr) {
    static_cast<Storage*>(loop.grad_hidden_probe)[row.results * in.projected_size + unit] =
        narrow<Storage>(grad_of_carried(in.options, masks, incoming));
  }
  return enter_hidden(in.options, masks, incoming);
}

// Row `row` at step s, to the edge of N_c.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE CellTrace<Compute> trace_cell(const StepBackward<Compute>& step, const StepRow& row, int64_t unit,
                                              const Gates<Compute>& gates) {
  const BackwardLoop& loop = step.loop;
  const LayerInputs& in = loop.layer.in;
  const int64_t H = in.hidden_size;
  const MaskKey key = row_key(loop.layer, step.masks.layer_direction, row.b);
  const SequenceMasks<Compute> sequence = sequence_masks(step.masks, key, unit);
  const StepMasks<Compute> masks = step_masks(step.masks, key, sequence, unit, row.t);
  ZonedGradients<Compute> hidden{0, 0};
  if (step.projected_of_step == nullptr) {
    hidden = trace_hidden<Storage>(step, row, unit, sequence, masks);
  } else {
    hidden.candidate = sum_of_parts<Storage>(step.grad_unprojected, row.b * H + unit, in.rows * H);
  }
  Compute incoming_cell = read_cell(step, row.b, row.length, unit);
  if (loop.grad_cells != nullptr) {
    incoming_cell += static_cast<const Compute*>(loop.grad_cells)[row.results * H + unit];
  }
  Compute previous_cell = 0;
  if (!begins_from_zero(in, row.b, row.length, step.s)) {
    if (step.s > 0) {
      const int64_t before = position(in, row.length, step.s - 1) * in.rows + row.b;
      previous_cell = static_cast<const Compute*>(loop.saved.cells)[before * H + unit];
    } else if (in.initial_cell != nullptr) {
      previous_cell = static_cast<const Compute*>(in.initial_cell)[row.b * H + unit];
    }
  }
  return enter_cell(masks, gates, previous_cell, hidden, incoming_cell);
}

// leave_output(), and where it is wanted u, which a projection has multiplied.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE Compute leave_output_of(const StepBackward<Compute>& step, const StepRow& row, int64_t unit,
                                        CellTrace<Compute>& trace, Compute argument) {
  const LayerInputs& in = step.loop.layer.in;
  if (step.loop.unprojected != nullptr) {
    const GroupedRow place = grouped_row(in, in.options.gradient_groups, row.b);
    static_cast<Storage*>(step.loop.unprojected)[place.at(row.t) * in.hidden_size + unit] =
        narrow<Storage>(trace.gates.o * tanh(argument));
  }
  return leave_output(trace, argument);
}

template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE void write_recurrent_gradient(const StepBackward<Compute>& step, const StepRow& row, int64_t unit,
                                              const Compute (&grads)[4]) {
  const int64_t H = step.loop.layer.in.hidden_size;
  write_gates(static_cast<Storage*>(step.loop.grad_recurrent), row.results, H, unit, grads);
  if (step.recurrent_of_step != nullptr) {
    write_gates(static_cast<Storage*>(step.recurrent_of_step), row.b, H, unit, grads);
  }
}

// From the edge of N_c, with the gradient that has come back through it, to dz and to what is carried. Where there is
// no norm of the recurrent term dz is da as well.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE CellDeparting<Compute> release_cell(const StepBackward<Compute>& step, const StepRow& row, int64_t unit,
                                                    const CellTrace<Compute>& trace, Compute grad_through_output) {
  const LayerInputs& in = step.loop.layer.in;
  const int64_t at = row.b * in.hidden_size + unit;
  const CellDeparting<Compute> departing =
      leave_cell(trace, grad_through_output, begins_from_zero(in, row.b, row.length, step.s));
  step.grad_cell[at] = departing.previous_cell;
  if (step.masks.zones_hidden && step.projected_of_step == nullptr) step.grad_hidden[at] = departing.previous_hidden;
  if (step.loop.grad_cell_probe != nullptr) {
    static_cast<Compute*>(step.loop.grad_cell_probe)[row.results * in.hidden_size + unit] =
        grad_of_cell(trace, grad_through_output);
  }
  if (step.loop.grad_gates != nullptr) {
    write_gates(static_cast<Compute*>(step.loop.grad_gates), row.results, in.hidden_size, unit,
                departing.pre_activations);
  }
  if (!in.options.norm_recurrent) write_recurrent_gradient<Storage>(step, row, unit, departing.pre_activations);
  return departing;
}

// A row that is past its end: its gradients pass by, its results are zeros. These are h's own.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE void pass_hidden_gradients(const StepBackward<Compute>& step, const StepRow& row, int64_t unit) {
  const BackwardLoop& loop = step.loop;
  if (loop.grad_hidden_probe == nullptr) return;
  static_cast<Storage*>(loop.grad_hidden_probe)[row.results * loop.layer.in.projected_size + unit] =
      narrow<Storage>(Compute(0));
}

template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE void pass_gradients(const StepBackward<Compute>& step, const StepRow& row, int64_t unit) {
  const BackwardLoop& loop = step.loop;
  const int64_t H = loop.layer.in.hidden_size;
  const Compute nothing[4] = {0, 0, 0, 0};
  write_recurrent_gradient<Storage>(step, row, unit, nothing);
  if (loop.grad_gates != nullptr) {
    write_gates(static_cast<Compute*>(loop.grad_gates), row.results, H, unit, nothing);
  }
  if (step.projected_of_step == nullptr) pass_hidden_gradients<Storage>(step, row, unit);
  if (loop.grad_cell_probe != nullptr) static_cast<Compute*>(loop.grad_cell_probe)[row.results * H + unit] = 0;
  if (loop.unprojected != nullptr) {
    const GroupedRow place = grouped_row(loop.layer.in, loop.layer.in.options.gradient_groups, row.b);
    static_cast<Storage*>(loop.unprojected)[place.at(row.t) * H + unit] = narrow<Storage>(Compute(0));
  }
  if (!loop.layer.in.options.norm_cell) return;
  static_cast<Compute*>(loop.grad_cell_normalised)[row.results * H + unit] = 0;
  static_cast<Compute*>(loop.cell_normalised)[row.results * H + unit] = 0;
}

template <class Compute>
FUSEDREG_DEVICE void keep_trace(const StepBackward<Compute>& step, int64_t b, int64_t unit,
                                const CellTrace<Compute>& trace, Compute scaled) {
  static_assert(sizeof(trace) == kTraceFields * sizeof(Compute));
  const int64_t states = step.loop.layer.in.rows * step.loop.layer.in.hidden_size;
  Compute values[kTraceFields];
  memcpy(values, &trace, sizeof(trace));
  Compute* to = step.kept + b * step.loop.layer.in.hidden_size + unit;
  for (int field = 0; field < kTraceFields; ++field) to[field * states] = values[field];
  to[kTraceFields * states] = scaled;
}

template <class Compute>
FUSEDREG_DEVICE CellTrace<Compute> kept_trace(const StepBackward<Compute>& step, int64_t b, int64_t unit,
                                              Compute& scaled) {
  const int64_t states = step.loop.layer.in.rows * step.loop.layer.in.hidden_size;
  const Compute* from = step.kept + b * step.loop.layer.in.hidden_size + unit;
  Compute values[kTraceFields];
  for (int field = 0; field < kTraceFields; ++field) values[field] = from[field * states];
  scaled = from[kTraceFields * states];
  CellTrace<Compute> trace;
  memcpy(&trace, values, sizeof(trace));
  return trace;
}

}  // namespace fusedreg::cuda
