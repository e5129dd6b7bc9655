// The step tier, on the host: positions and grids, shared by both directions.
#pragma once

#include "element_types.h"
#include "scratch.h"
#include "step_rows.cuh"
#include "step_tier.h"

namespace fusedreg::cuda {

// Whether all rows of one step stand at one position, which is then contiguous in every (T, B, ..) array.
inline bool steps_are_contiguous(const LayerInputs& in) { return !in.options.reverse || in.lengths == nullptr; }
inline int64_t position_of_step(const LayerInputs& in, int64_t s) { return in.options.reverse ? in.steps - 1 - s : s; }

inline int whole_warps(int64_t threads, int most) {
  const int64_t rounded = (threads + kWarp - 1) / kWarp * kWarp;
  return static_cast<int>(rounded < most ? rounded : most);
}

// A thread for each of `units` units of every row.
inline Launch units_launch(const LayerInputs& in, int64_t units, void* stream) {
  Launch launch;
  launch.threads = whole_warps(units, 256);
  launch.grid_x = static_cast<int>(in.rows * ((units + launch.threads - 1) / launch.threads));
  launch.stream = stream;
  return launch;
}

// The fused kernel of a step.
template <class Compute>
Launch step_launch(const LayerInputs& in, void* stream) {
  Launch launch = units_launch(in, in.hidden_size, stream);
  switch (in.options.norm) {
    case NormKind::None: return launch;
    case NormKind::Layer:
      launch.threads = whole_warps(in.hidden_size, kMostStepThreads<Compute>);
      launch.grid_x = static_cast<int>(in.rows);
      break;
    case NormKind::Batch:
      launch.threads = whole_warps(in.rows * kColumns, kMostStepThreads<Compute>);
      launch.grid_x = static_cast<int>((in.hidden_size + kColumns - 1) / kColumns);
      break;
  }
  launch.shared_bytes = sums_bytes<Compute>(launch.threads);
  return launch;
}

}  // namespace fusedreg::cuda
