// The forward loop of the cluster and the grid tier: one kernel, all steps, W_hh on the chip.
#pragma once

#include "loop.h"
#include "plan.h"

namespace fusedreg::cuda {

size_t persistent_forward_scratch(const LayerInputs& in, const Choice& choice);

// `choice` is from choose(), forward, and not of the step tier. Clears scratch and launches one kernel.
void persistent_forward(const ForwardLoop& loop, const Choice& choice);

// For choose(): the occupancy query of the kernel that `choice` would launch.
int persistent_forward_clusters(const LayerInputs& in, const Choice& choice);

}  // namespace fusedreg::cuda
