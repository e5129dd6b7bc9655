#include "persistent_backward.h"

#include <stdexcept>

#include "persistent_backward.cuh"

namespace fusedreg::cuda {

template <class Mode, int NT>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kProductThreads, 1) void persistent_backward_kernel(
    FUSEDREG_PARAMETER PersistentBackwardParams params) {
  PersistentBackward<Mode, NT>(params).run();
}

// Calls `visit` with the mode and the number of n-tiles as types.
template <class Visit>
static void for_kernel(const Choice& choice, const Visit& visit) {
  const auto with_units = [&](auto mode) {
    switch (choice.units_per_block) {
      case 8: return visit(mode, std::integral_constant<int, 1>{});
      case 16: return visit(mode, std::integral_constant<int, 2>{});
      case 32: return visit(mode, std::integral_constant<int, 4>{});
    }
    throw std::logic_error("persistent_backward: units_per_block must be 8, 16 or 32, got " +
                           std::to_string(choice.units_per_block));
  };
  switch (choice.arithmetic) {
    case Arithmetic::BFloat16: return with_units(BFloat16Product{});
    case Arithmetic::Float16: return with_units(Float16Product{});
    case Arithmetic::Tf32: return with_units(Tf32Product{});
    case Arithmetic::Float32: return with_units(Float32Product{});
    case Arithmetic::Float64: break;
  }
  throw std::logic_error("persistent_backward: float64 runs in the step tier alone");
}

size_t persistent_backward_scratch(const LayerInputs& in, const Choice& choice) {
  if (choice.tier == Tier::Cluster) return 0;
  return static_cast<size_t>(choice.tiles) * grid_exchange_bytes(backward_shape(in, choice).exchange());
}

void persistent_backward(const BackwardLoop& loop, const Choice& choice) {
  const LayerInputs& in = loop.layer.in;
  PersistentBackwardParams params;
  params.loop = loop;
  params.masks = loop_masks<float>(in);
  params.shape = backward_shape(in, choice);
  params.room = backward_room(params.shape);
  params.exchange = params.shape.exchange();
  Launch how;
  how.grid_x = choice.blocks * choice.tiles;
  how.threads = kProductThreads;
  how.shared_bytes = params.room.bytes;
  how.stream = loop.stream;
  if (choice.tier == Tier::Cluster) {
    how.cluster = choice.blocks;
  } else {
    how.cooperative = true;
    clear_async(loop.scratch, persistent_backward_scratch(in, choice), loop.stream);
  }
  for_kernel(choice, [&](auto mode, auto tiles) {
    launch<persistent_backward_kernel<decltype(mode), decltype(tiles)::value>>(how, params);
  });
}

int persistent_backward_clusters(const LayerInputs& in, const Choice& choice) {
  int clusters = 0;
  for_kernel(choice, [&](auto mode, auto tiles) {
    clusters = resident_clusters<persistent_backward_kernel<decltype(mode), decltype(tiles)::value>>(
        kProductThreads, backward_shared_bytes(backward_shape(in, choice)), choice.cluster);
  });
  return clusters;
}

}  // namespace fusedreg::cuda
