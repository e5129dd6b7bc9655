// Which tier runs a layer on a device, how it is cut up, and why: plain C++ that asks no device anything.
//
//   cluster  W_hh spread over the blocks of a thread-block cluster, which exchange h (backward: da) through shared
//   memory;
//            each cluster has a tile of the rows
//   grid     W_hh spread over blocks that are resident together, which exchange through the L2; where there are
//            multiprocessors left, several such groups share out the rows
//   step     one library product and one kernel a step: any size, any type
#pragma once

#include <cstddef>
#include <string>

#include "../common/params.h"
#include "persistent_backward_shape.h"
#include "persistent_forward_shape.h"
#include "runtime.h"

namespace fusedreg::cuda {

enum class Tier { Auto, Cluster, Grid, Step };
enum class Direction { Forward, Backward };
// How recurrent products are computed; sums are float32, or float64 for float64.
enum class Arithmetic { BFloat16, Float16, Tf32, Float32, Float64 };

struct Choice {
  Tier tier = Tier::Step;  // never Auto
  Direction direction = Direction::Forward;
  Arithmetic arithmetic = Arithmetic::Float32;
  // The persistent tiers alone:
  int units_per_block = 0;
  int blocks = 0;         // that share out the units: a group, which exchanges every step
  int cluster = 1;        // blocks a cluster: `blocks` in the cluster tier
  int tiles = 0;          // groups, each with a tile of the rows
  int rows_per_tile = 0;  // of the last tile there may be fewer
  int rows_per_pass = 0;  // forward: whose sums are in shared memory at a time, a multiple of 16
  size_t shared_bytes = 0;
  std::string reason;  // for people: the tier, how it is cut up, and why no other
};

// How many clusters of this choice the current device holds at a time: an occupancy query. Clusters of more than 8
// blocks are not portable, and a slice of a device may hold none of 8 either. Without a query every 8 multiprocessors
// hold one of up to 8.
using ResidentClusters = int (*)(const LayerInputs&, const Choice&);

// Reads sizes, type, rates and options of `in`, and whether there is a projection; follows no pointer. `tf32_allowed`:
// torch.get_float32_matmul_precision() is not "highest". Throws std::runtime_error("tier: ...") where a tier that is
// asked for cannot run, with the reason.
Choice choose(Direction direction, const LayerInputs& in, bool tf32_allowed, const DeviceLimits& limits,
              Tier asked = Tier::Auto, ResidentClusters resident_clusters = nullptr);

// How a persistent kernel is cut up by a choice of its direction.
ForwardShape forward_shape(const LayerInputs& in, const Choice& choice);
BackwardShape backward_shape(const LayerInputs& in, const Choice& choice);

// Both directions' reasons, a line each, for fusedreg.backends.explain().
std::string explain_choice(const LayerInputs& in, bool tf32_allowed, const DeviceLimits& limits,
                           ResidentClusters forward_clusters = nullptr, ResidentClusters backward_clusters = nullptr);

const char* tier_name(Tier tier);
// "auto", "cluster", "grid" or "step"; false for anything else.
bool parse_tier(const std::string& name, Tier& tier);

}  // namespace fusedreg::cuda
