// The backward loop of the cluster and the grid tier: one kernel, all steps, W_hh on the chip.
#pragma once

#include "loop.h"
#include "plan.h"

namespace fusedreg::cuda {

// `choice` is from choose(), backward, and not of the step tier.
size_t persistent_backward_scratch(const LayerInputs& in, const Choice& choice);

// Clears scratch and launches one kernel.
void persistent_backward(const BackwardLoop& loop, const Choice& choice);

// For choose(): the occupancy query of the kernel that `choice` would launch.
int persistent_backward_clusters(const LayerInputs& in, const Choice& choice);

}  // namespace fusedreg::cuda
