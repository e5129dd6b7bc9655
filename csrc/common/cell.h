// The cell's arithmetic, forward beside backward: the one C++ copy, used by every backend.
//
// Value is a scalar or a vector of them; sigmoid(Value) and tanh(Value) are found by argument-dependent lookup or
// must be visible where the template is instantiated. The equations are, with z the pre-activations:
//
//   i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o);  g = tanh(z_g)
//   candidate = cell_mask * (f * c_prev + update_mask * i * g)
//   h_candidate = o * tanh(N_c(candidate))
//   c = zone_c * c_prev + (1 - zone_c) * candidate,  h likewise
#pragma once

#include "philox.h"

namespace fusedreg {

template <class Value>
struct Gates {
  Value i, f, g, o;
};

template <class Value>
FUSEDREG_HOST_DEVICE static inline Value candidate_cell(const Gates<Value>& gates, Value previous_cell,
                                                        Value update_mask, Value cell_mask) {
  return (gates.f * previous_cell + update_mask * gates.i * gates.g) * cell_mask;
}

// Zoneout, by a mask of zeros and ones in training and by the rate in evaluation. Zeros and ones select: what is zoned
// out must not reach the result, not even as NaN times zero.
template <class Value>
FUSEDREG_HOST_DEVICE static inline Value zoned(Value zone, Value previous, Value candidate) {
  const Value mixed = zone * previous + (1 - zone) * candidate;
  return zone == 1 ? previous : (zone == 0 ? candidate : mixed);
}

// The same for scalars, by selection where the mask is a zero or a one: a candidate that has become NaN stays out of an
// element that is zoned out, and so on the way back.
template <class Value>
FUSEDREG_HOST_DEVICE static inline Value zoned_by_selection(Value zone, Value previous, Value candidate) {
  if (zone == Value(1)) return previous;
  return zone == Value(0) ? candidate : zoned(zone, previous, candidate);
}

// What zoneout passes back: to the previous state, and to the candidate.
template <class Value>
struct ZonedGradients {
  Value previous, candidate;
};

template <class Value>
FUSEDREG_HOST_DEVICE static inline ZonedGradients<Value> zoned_by_selection_backward(Value zone, Value grad) {
  if (zone == Value(1)) return {grad, Value(0)};
  if (zone == Value(0)) return {Value(0), grad};
  return {zone * grad, (1 - zone) * grad};
}

template <class Value>
struct CellGradients {
  Gates<Value> pre_activations;
  Value previous_cell;  // through the forget gate alone; zoneout's share is the caller's
};

// From the gradient of the candidate cell (before N_c's own, which the caller adds) to those of the pre-activations
// and of c_{s-1}. `grad_output_gate` is the gradient of o: h_candidate's times tanh(N_c(candidate)).
template <class Value>
FUSEDREG_HOST_DEVICE static inline CellGradients<Value> candidate_cell_backward(const Gates<Value>& gates,
                                                                                Value previous_cell, Value update_mask,
                                                                                Value cell_mask, Value grad_candidate,
                                                                                Value grad_output_gate) {
  const Value grad = grad_candidate * cell_mask;
  const Value grad_update = grad * update_mask;
  CellGradients<Value> result;
  result.pre_activations.i = grad_update * gates.g * gates.i * (1 - gates.i);
  result.pre_activations.f = grad * previous_cell * gates.f * (1 - gates.f);
  result.pre_activations.g = grad_update * gates.i * (1 - gates.g * gates.g);
  result.pre_activations.o = grad_output_gate * gates.o * (1 - gates.o);
  result.previous_cell = grad * gates.f;
  return result;
}

}  // namespace fusedreg
