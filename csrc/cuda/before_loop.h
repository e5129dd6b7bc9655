// What is made of weights, inputs and biases around the recurrent loop: masked copies, ready for products.
//
//   W̃_hh = M_w ⊙ W_hh,   x̄^k = m_x^k ⊙ x,   b = b_ih + b_hh
//
// Factors of products in 16 bits are masked by zeros and ones, and the product is scaled: masks.cuh says why.
#pragma once

#include "masks.cuh"

namespace fusedreg::cuda {

// Whether W_hh is masked in this call.
bool drops_weight(const LayerInputs& in);

// `to`, (4H, P) storage: W_hh, 0 where M_w drops.
void mask_weight(const LayerInputs& in, const MaskSeed& seed, void* to, void* stream);

// The way back: `to`, (groups, 4H, P) storage = scale M_w ⊙ grad, with `grad` of the compute type; may be `to` where
// the types are the same.
void mask_weight_gradient(const LayerInputs& in, const MaskSeed& seed, const void* grad, double scale, int64_t groups,
                          void* to, void* stream);

// `to`, of type `storage` = scale times `from`, of its compute type; may be `from` where the types are the same.
void scale_elements(ScalarType storage, const void* from, double scale, int64_t elements, void* to, void* stream);

// Whether inputs are masked at all, and whether by a mask a gate.
bool drops_inputs(const LayerInputs& in);
inline bool unties_inputs(const LayerInputs& in) { return drops_inputs(in) && in.options.untied_masks; }

// What a product of x̄ is still to be multiplied with.
double input_scale(const LayerInputs& in);

// x̄ of one gate (0 where masks are tied, or not drawn), (T * B, I) storage, by position, but for input_scale(): 0 in
// padding, whatever the input holds there. Rows stand in `groups` groups: row_groups.h.
void gather_inputs(const LayerInputs& in, const MaskSeed& seed, int gate, int64_t groups, void* to, void* stream);

// The way back: `grad`, (T * B, I) compute, times one gate's mask. `sum` (compute; null where masks are tied) collects
// the gates, beginning anew at gate 0; `to` (storage) receives the sum where it is not null.
void mask_input_gradient(const LayerInputs& in, const MaskSeed& seed, int gate, const void* grad, void* sum, void* to,
                         void* stream);

// (4H,) compute: both biases, and the shifts of the norms of input and recurrent terms where there are any.
void sum_biases(const LayerInputs& in, void* to, void* stream);

}  // namespace fusedreg::cuda
