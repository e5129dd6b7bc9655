// One cell at one step, forward and backward: what every tier does with it between its recurrent product and the next.
//
//   forward:  z -> begin_cell -> candidate -> [N_c] -> finish_cell -> h, c, y -> published_hidden for the next product
//   backward: gates -> enter_hidden, enter_cell -> [N_c's argument] -> leave_output -> [through N_c] -> leave_cell
//             -> dz, dc, dh
//
// A projection stands between the two halves of h, each way: o tanh(N_c(candidate)) -> finish_hidden.
//
// Values are of the compute type. Nothing here knows which thread owns which cell.
#pragma once

#include "../common/cell.h"
#include "device.h"
#include "loop.h"
#include "masks.cuh"
#include "storage.h"

namespace fusedreg::cuda {

// Steps row b takes part in.
FUSEDREG_DEVICE int64_t row_length(const LayerInputs& in, int64_t b) {
  if (in.lengths == nullptr) return in.steps;
  const int64_t given = in.lengths[b];
  return given < 0 ? 0 : given > in.steps ? in.steps : given;
}

// Where the step processed at s stands in the input. Padding stays where it is, so that s = 0 ... T-1 is a permutation.
FUSEDREG_DEVICE int64_t position(const LayerInputs& in, int64_t length, int64_t s) {
  return in.options.reverse && s < length ? length - 1 - s : s;
}

// Whether step s of row b begins from zero. False in padding, where resets are ignored, and past the last step.
FUSEDREG_DEVICE bool begins_from_zero(const LayerInputs& in, int64_t b, int64_t length, int64_t s) {
  return in.reset != nullptr && s < length && in.reset[position(in, length, s) * in.rows + b];
}

template <class Compute>
FUSEDREG_DEVICE Gates<Compute> activated(const Compute (&z)[4]) {
  return {sigmoid(z[0]), sigmoid(z[1]), tanh(z[2]), sigmoid(z[3])};
}

// ---- forward ----

template <class Compute>
struct CellEntry {
  Gates<Compute> gates;
  Compute candidate;  // before N_c
};

// The first half, from the pre-activations. `previous_cell` is 0 where the step begins from zero.
template <class Compute>
FUSEDREG_DEVICE CellEntry<Compute> begin_cell(const Compute (&z)[4], Compute previous_cell,
                                              const StepMasks<Compute>& masks) {
  const Gates<Compute> gates = activated(z);
  return {gates, candidate_cell(gates, previous_cell, masks.update, masks.cell)};
}

template <class Compute>
struct HiddenExit {
  Compute hidden;  // carried, rounded to storage
  Compute output;  // y, not yet rounded
};

// h and y from the candidate: o tanh(N_c(candidate)), or what a projection has made of it. `previous_hidden` is 0 where
// the step begins from zero.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE HiddenExit<Compute> finish_hidden(const Options& options, const StepMasks<Compute>& masks,
                                                  Compute previous_hidden, Compute candidate) {
  HiddenExit<Compute> exit;
  exit.hidden = rounded_to<Storage>(zoned_by_selection(masks.zone_hidden, previous_hidden, candidate));
  exit.output = (options.zoneout_candidate ? candidate : exit.hidden) * masks.output;
  return exit;
}

template <class Compute>
struct CellExit {
  Compute hidden;  // carried, rounded to storage
  Compute cell;    // carried
  Compute output;  // y, not yet rounded
};

// The second half. `normalised` is N_c(candidate), or the candidate itself. Both previous states are 0 where the step
// begins from zero.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE CellExit<Compute> finish_cell(const Options& options, const StepMasks<Compute>& masks,
                                              Compute output_gate, Compute previous_cell, Compute previous_hidden,
                                              Compute candidate, Compute normalised) {
  const HiddenExit<Compute> hidden =
      finish_hidden<Storage>(options, masks, previous_hidden, output_gate * tanh(normalised));
  return {hidden.hidden, zoned_by_selection(masks.zone_cell, previous_cell, candidate), hidden.output};
}

// h as the next step's product reads it: through one hidden mask (zeros and ones: LoopMasks::recurrent_scale is for the
// product's result; untied masks publish four copies), and 0 where that step begins from zero.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE Storage published_hidden(Compute hidden, Compute hidden_mask, bool next_begins_from_zero) {
  return narrow<Storage>(next_begins_from_zero ? Compute(0) : hidden * hidden_mask);
}

// The results of one cell. `at` is (t * B + b) * H + unit, of h and y with P for H.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE void write_hidden(const LayerOutputs& out, int64_t at, Compute hidden, Compute output) {
  if (out.output != nullptr) static_cast<Storage*>(out.output)[at] = narrow<Storage>(output);
  if (out.hidden != nullptr) static_cast<Storage*>(out.hidden)[at] = narrow<Storage>(hidden);
}
template <class Compute>
FUSEDREG_DEVICE void write_cell(const LayerOutputs& out, int64_t at, Compute cell) {
  if (out.cells != nullptr) static_cast<Compute*>(out.cells)[at] = cell;
}
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE void write_states(const LayerOutputs& out, int64_t at, const CellExit<Compute>& exit) {
  write_hidden<Storage>(out, at, exit.hidden, exit.output);
  write_cell(out, at, exit.cell);
}

// Gates after their activations, in their kept form: what is saved without a norm. `row` is t * B + b.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE void write_activated_gates(void* gates, int64_t row, int64_t hidden_size, int64_t unit,
                                           const Gates<Compute>& values) {
  if (gates == nullptr) return;
  Kept<Storage>* to = static_cast<Kept<Storage>*>(gates) + row * 4 * hidden_size + unit;
  to[0] = keep_activation<Storage>(values.i, false);
  to[hidden_size] = keep_activation<Storage>(values.f, false);
  to[2 * hidden_size] = keep_activation<Storage>(values.g, true);
  to[3 * hidden_size] = keep_activation<Storage>(values.o, false);
}

template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE Gates<Compute> read_activated_gates(const void* gates, int64_t row, int64_t hidden_size, int64_t unit) {
  const Kept<Storage>* from = static_cast<const Kept<Storage>*>(gates) + row * 4 * hidden_size + unit;
  return {kept_activation<Storage>(from[0], false), kept_activation<Storage>(from[hidden_size], false),
          kept_activation<Storage>(from[2 * hidden_size], true),
          kept_activation<Storage>(from[3 * hidden_size], false)};
}

// One value of each gate of a unit, in a (.., 4H) array: raw pre-activations, their terms, their gradients.
template <class Value, class Compute>
FUSEDREG_DEVICE void write_gates(Value* gates, int64_t row, int64_t hidden_size, int64_t unit,
                                 const Compute (&values)[4]) {
  Value* to = gates + row * 4 * hidden_size + unit;
  for (int gate = 0; gate < 4; ++gate) to[gate * hidden_size] = narrow<Value>(values[gate]);
}

template <class Compute>
FUSEDREG_DEVICE void read_gates(const Compute* gates, int64_t row, int64_t hidden_size, int64_t unit,
                                Compute (&values)[4]) {
  const Compute* from = gates + row * 4 * hidden_size + unit;
  for (int gate = 0; gate < 4; ++gate) values[gate] = from[gate * hidden_size];
}

// ---- backward ----

// What reaches a cell from outside. `output` is grad_output as given, before y's masks.
template <class Compute>
struct CellIncoming {
  Compute output, hidden, cell;
};

template <class Compute>
struct CellTrace {
  Gates<Compute> gates;
  Compute previous_cell, update, cell_mask;
  Compute candidate;
  Compute grad_hidden_candidate;
  Compute grad_output_gate;      // from leave_output on
  Compute grad_candidate;        // zoneout's part; tanh's comes through N_c
  Compute grad_previous_cell;    // zoneout's part
  Compute grad_previous_hidden;  // zoneout's part; the rest is the product da W_hh
};

// What reaches the carried h_s, which is the gradient of its probe: where y is h_s, by way of y too.
template <class Compute>
FUSEDREG_DEVICE Compute grad_of_carried(const Options& options, const StepMasks<Compute>& masks,
                                        const CellIncoming<Compute>& incoming) {
  return incoming.hidden + (options.zoneout_candidate ? Compute(0) : incoming.output * masks.output);
}

// Through zoneout to the candidate of h and to the h before.
template <class Compute>
FUSEDREG_DEVICE ZonedGradients<Compute> enter_hidden(const Options& options, const StepMasks<Compute>& masks,
                                                     const CellIncoming<Compute>& incoming) {
  ZonedGradients<Compute> hidden =
      zoned_by_selection_backward(masks.zone_hidden, grad_of_carried(options, masks, incoming));
  if (options.zoneout_candidate) hidden.candidate += incoming.output * masks.output;
  return hidden;
}

// From what reaches h and c_s to the edge of N_c. A row in padding does not come here: its gradients pass by.
// `previous_cell` is 0 where the step begins from zero.
template <class Compute>
FUSEDREG_DEVICE CellTrace<Compute> enter_cell(const StepMasks<Compute>& masks, const Gates<Compute>& gates,
                                              Compute previous_cell, const ZonedGradients<Compute>& hidden,
                                              Compute incoming_cell) {
  CellTrace<Compute> trace;
  trace.gates = gates;
  trace.previous_cell = previous_cell;
  trace.update = masks.update;
  trace.cell_mask = masks.cell;
  trace.candidate = candidate_cell(gates, previous_cell, masks.update, masks.cell);
  const ZonedGradients<Compute> cell = zoned_by_selection_backward(masks.zone_cell, incoming_cell);
  trace.grad_hidden_candidate = hidden.candidate;
  trace.grad_output_gate = 0;
  trace.grad_candidate = cell.candidate;
  trace.grad_previous_cell = cell.previous;
  trace.grad_previous_hidden = hidden.previous;
  return trace;
}

// Through h_candidate = o tanh(argument), the argument being N_c(candidate) or the candidate itself. Returns the
// gradient of the argument.
template <class Compute>
FUSEDREG_DEVICE Compute leave_output(CellTrace<Compute>& trace, Compute argument) {
  const Compute squashed = tanh(argument);
  trace.grad_output_gate = trace.grad_hidden_candidate * squashed;
  return trace.grad_hidden_candidate * trace.gates.o * (1 - squashed * squashed);
}

// What reaches the cell of this step wherever it is read, which is the gradient of its probe: the carried c_s, whose
// gradient zoneout has split, and by tanh the candidate.
template <class Compute>
FUSEDREG_DEVICE Compute grad_of_cell(const CellTrace<Compute>& trace, Compute grad_through_output) {
  return (trace.grad_candidate + trace.grad_previous_cell) + grad_through_output;
}

template <class Compute>
struct CellDeparting {
  Compute pre_activations[4];  // dz
  Compute previous_cell;       // dc_{s-1}; 0 where the step began from zero
  Compute previous_hidden;     // zoneout's part of dh_{s-1}; 0 likewise. The product's part must be dropped there too
};

// The second half. `grad_through_output` is the gradient of the candidate by way of tanh: leave_output's result, taken
// back through N_c where there is one.
template <class Compute>
FUSEDREG_DEVICE CellDeparting<Compute> leave_cell(const CellTrace<Compute>& trace, Compute grad_through_output,
                                                  bool began_from_zero) {
  const CellGradients<Compute> gradients =
      candidate_cell_backward(trace.gates, trace.previous_cell, trace.update, trace.cell_mask,
                              trace.grad_candidate + grad_through_output, trace.grad_output_gate);
  CellDeparting<Compute> departing;
  departing.pre_activations[0] = gradients.pre_activations.i;
  departing.pre_activations[1] = gradients.pre_activations.f;
  departing.pre_activations[2] = gradients.pre_activations.g;
  departing.pre_activations[3] = gradients.pre_activations.o;
  departing.previous_cell = began_from_zero ? Compute(0) : gradients.previous_cell + trace.grad_previous_cell;
  departing.previous_hidden = began_from_zero ? Compute(0) : trace.grad_previous_hidden;
  return departing;
}

}  // namespace fusedreg::cuda
