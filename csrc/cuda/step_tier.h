// The step tier: for each step one product of the library's and one fused kernel. Any shape, any type, either norm; the
// grids follow from T, B and H alone, so that a captured graph serves any lengths.
#pragma once

#include "loop.h"
#include "plan.h"
#include "products.h"

namespace fusedreg::cuda {

// The choice is that of plan.h, as for every tier; here nothing is left to choose.
size_t step_forward_scratch(const LayerInputs& in, const Choice& choice);
void step_forward(const ForwardLoop& loop, const Choice& choice, Products& products);
size_t step_backward_scratch(const LayerInputs& in, const Choice& choice);
void step_backward(const BackwardLoop& loop, const Choice& choice, Products& products);

}  // namespace fusedreg::cuda
