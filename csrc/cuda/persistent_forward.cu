#include "persistent_forward.h"

#include <stdexcept>

#include "persistent_forward.cuh"

namespace fusedreg::cuda {
namespace {

ForwardShape shape_of(const LayerInputs& in, const Choice& choice) { return forward_shape(in, choice); }

// Calls action(mode, units, clustered) with the kernel's template arguments, as values of types that carry them.
template <int value>
using Number = std::integral_constant<int, value>;

template <class Mode, class Action>
auto with_units(const Choice& choice, const Action& action) {
  if (choice.tier == Tier::Cluster) return action(Mode{}, Number<32>{}, std::true_type{});
  if (choice.units_per_block == 8) return action(Mode{}, Number<8>{}, std::false_type{});
  return action(Mode{}, Number<16>{}, std::false_type{});
}

template <class Action>
auto with_kernel(const Choice& choice, const Action& action) {
  switch (choice.arithmetic) {
    case Arithmetic::BFloat16: return with_units<BFloat16Product>(choice, action);
    case Arithmetic::Float16: return with_units<Float16Product>(choice, action);
    case Arithmetic::Tf32: return with_units<Tf32Product>(choice, action);
    case Arithmetic::Float32: return with_units<Float32Product>(choice, action);
    case Arithmetic::Float64: break;
  }
  throw std::runtime_error("tier: expected a choice of the cluster or the grid tier, got float64; use the step tier");
}

}  // namespace
}  // namespace fusedreg::cuda
