// What is made of weights, inputs and biases around the recurrent loop: masked copies, ready for products.
//
//   W̃_hh = M_w ⊙ W_hh,   x̄^k = m_x^k ⊙ x,   b = b_ih + b_hh
#pragma once

#include "../common/params.h"

namespace fusedreg::cuda {

// `to`, (4H, H) storage = M_w ⊙ from. `from` is of the storage type, or of the compute type: so are gradients, which
// meet the same mask.
void mask_weight(const LayerInputs& in, const int64_t* seed, const void* from, bool from_compute, void* to,
                 void* stream);

// `to`, of the storage type = `from`, of the compute type, rounded.
void narrow_elements(ScalarType storage, const void* from, int64_t elements, void* to, void* stream);

// Whether inputs are masked at all, and whether by a mask a gate.
bool drops_inputs(const LayerInputs& in);
inline bool unties_inputs(const LayerInputs& in) { return drops_inputs(in) && in.options.untied_masks; }

// x̄ of one gate (0 where masks are tied, or not drawn), (T * B, I) storage, by position: 0 in padding, whatever the
// input holds there.
void gather_inputs(const LayerInputs& in, const int64_t* seed, int gate, void* to, void* stream);

// The way back: `grad`, (T * B, I) compute, times one gate's mask. `sum` (compute; null where masks are tied) collects
// the gates, beginning anew at gate 0; `to` (storage) receives the sum where it is not null.
void mask_input_gradient(const LayerInputs& in, const int64_t* seed, int gate, const void* grad, void* sum, void* to,
                         void* stream);

// (4H,) compute: both biases, and the shifts of the norms of input and recurrent terms where there are any.
void sum_biases(const LayerInputs& in, void* to, void* stream);

}  // namespace fusedreg::cuda
