// The step tier, on the host: scratch, types and grids, shared by both directions.
#pragma once

#include "step_rows.cuh"
#include "step_tier.h"

namespace fusedreg::cuda {

inline bool is_narrow(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Float16; }
inline ScalarType compute_type(ScalarType type) { return is_narrow(type) ? ScalarType::Float32 : type; }
inline size_t bytes_of(ScalarType type) { return is_narrow(type) ? 2 : type == ScalarType::Float64 ? 8 : 4; }

// Hands out parts of the scratch; with no base it measures.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}
  void* take(int64_t count, ScalarType type) {
    void* part = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (static_cast<size_t>(count) * bytes_of(type) + 255) / 256 * 256;
    return part;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Whether all rows of one step stand at one position, which is then contiguous in every (T, B, ..) array.
inline bool steps_are_contiguous(const LayerInputs& in) { return !in.options.reverse || in.lengths == nullptr; }
inline int64_t position_of_step(const LayerInputs& in, int64_t s) { return in.options.reverse ? in.steps - 1 - s : s; }

inline int whole_warps(int64_t threads, int most) {
  const int64_t rounded = (threads + kWarp - 1) / kWarp * kWarp;
  return static_cast<int>(rounded < most ? rounded : most);
}

// One thread a cell.
inline Launch cells_launch(const LayerInputs& in, void* stream) {
  Launch launch;
  launch.threads = whole_warps(in.hidden_size, 256);
  launch.grid_x = static_cast<int>(in.rows * ((in.hidden_size + launch.threads - 1) / launch.threads));
  launch.stream = stream;
  return launch;
}

// The fused kernel of a step.
template <class Compute>
Launch step_launch(const LayerInputs& in, void* stream) {
  Launch launch = cells_launch(in, stream);
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

// Calls `run` with a value of the storage type.
template <class Run>
void with_storage(ScalarType type, Run&& run) {
  switch (type) {
    case ScalarType::Float32: return run(float{});
    case ScalarType::Float64: return run(double{});
    case ScalarType::BFloat16: return run(BFloat16{});
    case ScalarType::Float16: return run(Float16{});
  }
}

}  // namespace fusedreg::cuda
