#include "plan.h"

#include <cstdarg>
#include <cstdio>
#include <stdexcept>

namespace fusedreg::cuda {
namespace {

// What candidates are compared by: the time of a step, by arithmetic for an H200, not measured yet. Only the ratios
// matter to the choice. Rates are of one multiprocessor, a clock cycle.
struct Rates {
  double cycles_per_microsecond = 1750;
  double exchange_grid = 1900;    // cycles from a block's publication to the others' reads
  double exchange_cluster = 450;  //
  double l2_bytes = 64;
  double shared_bytes = 128;
  double cluster_store_bytes = 32;
  double products_16_bits = 1300;  // multiply-adds
  double products_tf32 = 650;
  double products_float32 = 100;
  double cells = 0.6;  // cells through their activations
};
constexpr Rates kRates;

// Few wide blocks and many tiles of the rows read less of da, which is four times as wide as h; forward, the sums of a
// block of 32 units leave no registers for W.
constexpr int kGridUnits[] = {8, 16, 32};
constexpr int kMostForwardGridUnits = 16;
constexpr int kClusterUnits[] = {32};
constexpr int kResidentClusters = 16;  // of any device so far
constexpr int kPortableCluster = 8;    // of every device that has clusters
// The fewest rows a tile is given. Fewer cost as much to multiply (a matrix instruction has 16), but leave fewer cells
// to a block; in a grid the exchange outweighs that.
constexpr int64_t kLeastGridRows = 8;
constexpr int64_t kLeastClusterRows = 4;
constexpr int64_t kMostRows = 4096;  // of a tile; far more than fits

__attribute__((format(printf, 1, 2))) std::string formatted(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return text;
}

Arithmetic arithmetic_of(const LayerInputs& in, bool tf32_allowed) {
  switch (in.dtype) {
    case ScalarType::BFloat16: return Arithmetic::BFloat16;
    case ScalarType::Float16: return Arithmetic::Float16;
    case ScalarType::Float64: return Arithmetic::Float64;
    case ScalarType::Float32: break;
  }
  return tf32_allowed ? Arithmetic::Tf32 : Arithmetic::Float32;
}

int storage_bytes(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::BFloat16 || arithmetic == Arithmetic::Float16 ? 2 : 4;
}

int hidden_copies(const LayerInputs& in) {
  return in.options.training && in.options.untied_masks && in.rates.hidden_dropout > 0 ? 4 : 1;
}

// What no persistent kernel can; empty where there is nothing. A projection is a second product with a width of its
// own, and a second exchange in each step.
std::string step_alone(const LayerInputs& in) {
  if (in.dtype == ScalarType::Float64) return "float64";
  if (in.projected_size == in.hidden_size && in.weight_hr == nullptr) return "";
  return formatted("a projection (H = %lld to P = %lld)", static_cast<long long>(in.hidden_size),
                   static_cast<long long>(in.projected_size));
}

// Exchanges of one step: h (da), and one more for each layer norm; its backward sums over rows as often.
int exchanges(const LayerInputs& in) {
  if (in.options.norm != NormKind::Layer) return 1;
  return 1 + (in.options.norm_recurrent ? 1 : 0) + (in.options.norm_cell ? 1 : 0);
}

int64_t rounded_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The microseconds of a step, for the whole batch, of which `groups` tiles run at a time.
double step_time(const LayerInputs& in, const Choice& choice, size_t fragment_bytes, int groups) {
  const bool clustered = choice.tier == Tier::Cluster, forward = choice.direction == Direction::Forward;
  const double rows = choice.rows_per_tile,
               tiles_of_16 = static_cast<double>(rounded_up(choice.rows_per_tile, 16) / 16);
  const double bytes = storage_bytes(choice.arithmetic), hidden = static_cast<double>(in.hidden_size);
  const double copies = forward ? hidden_copies(in) : 4;  // as wide as h
  const double products = choice.arithmetic == Arithmetic::Tf32      ? kRates.products_tf32
                          : choice.arithmetic == Arithmetic::Float32 ? kRates.products_float32
                                                                     : kRates.products_16_bits;
  const double cells = rows * choice.units_per_block;
  double cycles = exchanges(in) * (clustered ? kRates.exchange_cluster : kRates.exchange_grid);
  cycles += tiles_of_16 * 16 * 4 * choice.units_per_block * hidden / products;
  cycles += tiles_of_16 * static_cast<double>(fragment_bytes) / kRates.shared_bytes;
  cycles += rows * hidden * bytes * copies / (clustered ? kRates.shared_bytes : kRates.l2_bytes);
  if (clustered) cycles += cells * bytes * copies * choice.blocks / kRates.cluster_store_bytes;
  cycles += cells / kRates.cells + cells * (forward ? 4 : 1) * kProductWarps * 4 / kRates.shared_bytes;
  const int waves = (choice.tiles + groups - 1) / groups;
  return cycles * waves / kRates.cycles_per_microsecond;
}

// Looks for the fastest way to cut a layer up for one tier, and keeps why there is none.
class Search {
 public:
  Search(const LayerInputs& in, const DeviceLimits& limits, ResidentClusters resident_clusters)
      : in_(in), limits_(limits), resident_clusters_(resident_clusters) {}

  bool found() const { return time_ >= 0; }
  double time() const { return time_; }
  const Choice& best() const { return best_; }
  const std::string& failure() const { return failure_; }

  void run(Choice candidate) {
    if (candidate.tier == Tier::Cluster) {
      for (const int units : kClusterUnits) try_units(candidate, units);
    } else {
      for (const int units : kGridUnits) {
        if (candidate.direction == Direction::Backward || units <= kMostForwardGridUnits) try_units(candidate, units);
      }
    }
  }

 private:
  void try_units(Choice candidate, int units) {
    const int64_t blocks = (in_.hidden_size + units - 1) / units;
    candidate.units_per_block = units;
    if (!blocks_fit(candidate, blocks)) return;
    candidate.blocks = static_cast<int>(blocks);
    if (candidate.tier == Tier::Cluster) candidate.cluster = candidate.blocks;
    const int64_t most_tiles = candidate.tier == Tier::Grid ? limits_.multiprocessors / blocks : in_.rows + 1;
    // Batch norm keeps the whole batch in one tile: a column's statistics are then its block's own.
    const bool whole = in_.options.norm == NormKind::Batch;
    const int64_t least = whole ? in_.rows : (in_.rows + most_tiles - 1) / most_tiles;
    int64_t rows = candidate.tier == Tier::Grid ? kLeastGridRows : kLeastClusterRows;
    while (rows < least) rows = next_rows(rows, least);
    for (;; rows = next_rows(rows, rows)) {
      if (!try_rows(candidate, rows < in_.rows ? rows : in_.rows)) return;
      if (rows >= in_.rows) return;
    }
  }

  // The next number of rows to try that is above `rows`, or not below `least` where that is more.
  static int64_t next_rows(int64_t rows, int64_t least) {
    if (rows < kTileRows) return 2 * rows;
    return least > rows ? rounded_up(least, kTileRows) : rows + kTileRows;
  }

  bool blocks_fit(const Choice& candidate, int64_t blocks) {
    const long long hidden = in_.hidden_size, needed = blocks;
    const int units = candidate.units_per_block;
    if (candidate.tier == Tier::Grid) {
      if (blocks <= limits_.multiprocessors) return true;
      failure_ = formatted("H = %lld needs %lld blocks of %d units, and there are %d multiprocessors", hidden, needed,
                           units, limits_.multiprocessors);
      return false;
    }
    if (limits_.major < 9) {
      failure_ =
          formatted("clusters need compute capability 9.0, and the device has %d.%d", limits_.major, limits_.minor);
      return false;
    }
    if (blocks <= kResidentClusters) return true;
    failure_ = formatted("H = %lld needs %lld blocks of %d units, and a cluster has at most %d", hidden, needed, units,
                         kResidentClusters);
    return false;
  }

  // False where this many rows do not fit, so that more do not either.
  bool try_rows(Choice candidate, int64_t rows) {
    if (rows > kMostRows || !fit_shared_memory(candidate, rows)) {
      if (!found()) {
        failure_ = formatted("%lld rows and %d units of H = %lld do not fit the %d KB of shared memory of a block",
                             static_cast<long long>(rows), candidate.units_per_block,
                             static_cast<long long>(in_.hidden_size), limits_.shared_bytes_per_block / 1024);
      }
      return false;
    }
    int groups = candidate.tiles;  // that run at a time
    if (candidate.tier == Tier::Cluster && (groups = clusters_of(candidate)) == 0) {
      if (!found()) {
        failure_ = formatted("H = %lld needs a cluster of %d blocks, and the device %s",
                             static_cast<long long>(in_.hidden_size), candidate.blocks,
                             resident_clusters_ != nullptr ? "holds none" : "is not known to hold one");
      }
      return false;
    }
    const double time = step_time(in_, candidate, fragment_bytes(candidate), groups);
    if (!found() || time < time_) {
      time_ = time;
      best_ = candidate;
    }
    return true;
  }

  // That the device holds at a time.
  int clusters_of(const Choice& candidate) const {
    if (resident_clusters_ != nullptr) return resident_clusters_(in_, candidate);
    return candidate.blocks > kPortableCluster ? 0 : limits_.multiprocessors / candidate.blocks;
  }

  bool fit_shared_memory(Choice& candidate, int64_t rows) const {
    const size_t limit = static_cast<size_t>(limits_.shared_bytes_per_block);
    candidate.rows_per_tile = static_cast<int>(rows);
    candidate.tiles = rows == 0 ? 1 : static_cast<int>((in_.rows + rows - 1) / rows);
    if (candidate.direction == Direction::Backward) {
      candidate.shared_bytes = backward_shared_bytes(backward_shape(in_, candidate));
      return candidate.shared_bytes <= limit;
    }
    // As many rows a pass as there is room for: each pass costs two barriers.
    candidate.rows_per_pass = kTileRows;
    candidate.shared_bytes = ForwardRoom(forward_shape(in_, candidate)).bytes;
    if (candidate.shared_bytes > limit) return false;
    const size_t more = ProductSizes::partial_bytes(4 * candidate.units_per_block, kTileRows);
    while (candidate.rows_per_pass < rows && candidate.shared_bytes + more <= limit) {
      candidate.rows_per_pass += kTileRows;
      candidate.shared_bytes += more;
    }
    return true;
  }

  size_t fragment_bytes(const Choice& candidate) const {
    if (candidate.direction == Direction::Forward) {
      const ForwardShape shape = forward_shape(in_, candidate);
      return ProductSizes::fragment_bytes(shape.columns(), shape.register_chunks(), shape.most_chunks());
    }
    const BackwardShape shape = backward_shape(in_, candidate);
    return ProductSizes::fragment_bytes(shape.units, shape.register_chunks(), shape.most_chunks());
  }

  const LayerInputs& in_;
  const DeviceLimits& limits_;
  ResidentClusters resident_clusters_;
  Choice best_;
  double time_ = -1;
  std::string failure_;
};

std::string persistent_reason(const Choice& choice, double time) {
  const std::string tiles = choice.tiles == 1 ? formatted("all %d rows", choice.rows_per_tile)
                                              : formatted("%d tiles of %d rows", choice.tiles, choice.rows_per_tile);
  return formatted("%s: %d blocks of %d units, %s, %d KB of shared memory a block; %.1f us a step by arithmetic",
                   tier_name(choice.tier), choice.blocks, choice.units_per_block, tiles.c_str(),
                   static_cast<int>((choice.shared_bytes + 1023) / 1024), time);
}

// A tier that was asked for by name and cannot run.
[[noreturn]] void refuse(Tier tier, const std::string& reason) {
  throw std::runtime_error(std::string("tier: \"") + tier_name(tier) + "\" was asked for and cannot run: " + reason +
                           "; expected a layer that fits it; use \"auto\" or \"step\"");
}

}  // namespace

const char* tier_name(Tier tier) {
  switch (tier) {
    case Tier::Auto: return "auto";
    case Tier::Cluster: return "cluster";
    case Tier::Grid: return "grid";
    case Tier::Step: break;
  }
  return "step";
}

bool parse_tier(const std::string& name, Tier& tier) {
  for (const Tier known : {Tier::Auto, Tier::Cluster, Tier::Grid, Tier::Step}) {
    if (name != tier_name(known)) continue;
    tier = known;
    return true;
  }
  return false;
}

ForwardShape forward_shape(const LayerInputs& in, const Choice& choice) {
  ForwardShape shape;
  shape.clustered = choice.tier == Tier::Cluster;
  shape.rows = choice.rows_per_tile;
  shape.rows_per_pass = choice.rows_per_pass;
  shape.units = choice.units_per_block;
  shape.blocks = choice.blocks;
  shape.hidden_size = static_cast<int>(in.hidden_size);
  shape.storage_bytes = storage_bytes(choice.arithmetic);
  shape.matrix_instructions = choice.arithmetic != Arithmetic::Float32;
  shape.copies = hidden_copies(in);
  shape.norm = in.options.norm;
  shape.norm_recurrent = in.options.norm_recurrent;
  shape.norm_cell = in.options.norm_cell;
  return shape;
}

BackwardShape backward_shape(const LayerInputs& in, const Choice& choice) {
  BackwardShape shape;
  shape.clustered = choice.tier == Tier::Cluster;
  shape.rows = choice.rows_per_tile;
  shape.units = choice.units_per_block;
  shape.blocks = choice.blocks;
  shape.hidden_size = static_cast<int>(in.hidden_size);
  shape.storage_bytes = storage_bytes(choice.arithmetic);
  shape.matrix_instructions = choice.arithmetic != Arithmetic::Float32;
  shape.norm = in.options.norm;
  shape.norm_recurrent = in.options.norm_recurrent;
  shape.norm_cell = in.options.norm_cell;
  shape.activated = in.options.save != Save::Recompute && in.options.norm == NormKind::None;
  shape.grad_cells = in.options.return_cells;
  return shape;
}

Choice choose(Direction direction, const LayerInputs& in, bool tf32_allowed, const DeviceLimits& limits, Tier asked,
              ResidentClusters resident_clusters) {
  Choice choice;
  choice.direction = direction;
  choice.arithmetic = arithmetic_of(in, tf32_allowed);
  if (asked == Tier::Step) {
    choice.reason = "step: it was asked for";
    return choice;
  }
  if (const std::string why = step_alone(in); !why.empty()) {
    if (asked != Tier::Auto) refuse(asked, why + " has no kernel but that of the step tier");
    choice.reason = "step: " + why + " has no kernel but that of this tier";
    return choice;
  }
  Search cluster(in, limits, resident_clusters), grid(in, limits, nullptr);
  if (asked != Tier::Grid) {
    choice.tier = Tier::Cluster;
    cluster.run(choice);
    if (asked == Tier::Cluster && !cluster.found()) refuse(asked, cluster.failure());
  }
  if (asked != Tier::Cluster) {
    choice.tier = Tier::Grid;
    grid.run(choice);
    if (asked == Tier::Grid && !grid.found()) refuse(asked, grid.failure());
  }
  if (!cluster.found() && !grid.found()) {
    choice.tier = Tier::Step;
    choice.reason = "step: no cluster, since " + cluster.failure() + "; no grid, since " + grid.failure();
    return choice;
  }
  const bool take_cluster = cluster.found() && (!grid.found() || cluster.time() <= grid.time());
  const Search& taken = take_cluster ? cluster : grid;
  const Search& other = take_cluster ? grid : cluster;
  choice = taken.best();
  choice.reason = persistent_reason(choice, taken.time());
  if (asked != Tier::Auto) return choice;
  const char* other_name = tier_name(take_cluster ? Tier::Grid : Tier::Cluster);
  choice.reason += other.found() ? formatted(" (%s: %.1f)", other_name, other.time())
                                 : formatted(" (no %s, since ", other_name) + other.failure() + ")";
  return choice;
}

std::string explain_choice(const LayerInputs& in, bool tf32_allowed, const DeviceLimits& limits,
                           ResidentClusters forward_clusters, ResidentClusters backward_clusters) {
  const auto reason = [&](Direction direction, ResidentClusters clusters) {
    return choose(direction, in, tf32_allowed, limits, Tier::Auto, clusters).reason;
  };
  return "forward: " + reason(Direction::Forward, forward_clusters) +
         "\nbackward: " + reason(Direction::Backward, backward_clusters);
}

}  // namespace fusedreg::cuda
