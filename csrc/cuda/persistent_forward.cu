#include "persistent_forward.cuh"

#include <stdexcept>

#include "persistent_forward.h"

namespace fusedreg::cuda {
namespace {

// What a kernel is made for: how it multiplies, the units of a block, whether blocks are of a cluster.
template <class Mode_, int U, bool clustered>
struct Variant {
  using Mode = Mode_;
  static constexpr int kUnits = U;
  static constexpr bool kClustered = clustered;
};

template <class Mode, class Action>
auto with_units(const Choice& choice, const Action& action) {
  if (choice.tier == Tier::Cluster) return action(Variant<Mode, 32, true>{});
  if (choice.units_per_block == 8) return action(Variant<Mode, 8, false>{});
  return action(Variant<Mode, 16, false>{});
}

template <class Action>
auto with_variant(const Choice& choice, const Action& action) {
  switch (choice.arithmetic) {
    case Arithmetic::BFloat16: return with_units<BFloat16Product>(choice, action);
    case Arithmetic::Float16: return with_units<Float16Product>(choice, action);
    case Arithmetic::Tf32: return with_units<Tf32Product>(choice, action);
    case Arithmetic::Float32: return with_units<Float32Product>(choice, action);
    case Arithmetic::Float64: break;
  }
  throw std::runtime_error("tier: expected float32, bfloat16 or float16, got float64; use \"step\"");
}

}  // namespace

size_t persistent_forward_scratch(const LayerInputs& in, const Choice& choice) {
  if (choice.tier == Tier::Cluster) return 0;
  return static_cast<size_t>(choice.tiles) * grid_exchange_bytes(forward_shape(in, choice).exchange());
}

void persistent_forward(const ForwardLoop& loop, const Choice& choice) {
  const LayerInputs& in = loop.layer.in;
  const ForwardShape shape = forward_shape(in, choice);
  const PersistentForwardParams params{loop,
                                       loop_masks<float>(in),
                                       shape,
                                       ForwardRoom(shape),
                                       shape.exchange(),
                                       shape.chunks(),
                                       shape.most_chunks(),
                                       shape.working_warps()};
  const size_t scratch = persistent_forward_scratch(in, choice);
  if (scratch > loop.scratch_bytes) throw std::runtime_error("persistent_forward: scratch is smaller than asked for");
  if (scratch > 0) clear_async(loop.scratch, scratch, loop.stream);
  Launch how;
  how.grid_x = choice.blocks * choice.tiles;
  how.threads = kProductThreads;
  how.shared_bytes = params.room.bytes;
  how.cooperative = choice.tier == Tier::Grid;
  how.cluster = choice.cluster;
  how.stream = loop.stream;
  with_variant(choice, [&](auto variant) {
    using V = decltype(variant);
    launch<persistent_forward_kernel<typename V::Mode, V::kUnits, V::kClustered>>(how, params);
  });
}

int persistent_forward_clusters(const LayerInputs& in, const Choice& choice) {
  const size_t shared = ForwardRoom(forward_shape(in, choice)).bytes;
  return with_variant(choice, [&](auto variant) {
    using V = decltype(variant);
    return resident_clusters<persistent_forward_kernel<typename V::Mode, V::kUnits, V::kClustered>>(
        kProductThreads, shared, choice.cluster);
  });
}

}  // namespace fusedreg::cuda
