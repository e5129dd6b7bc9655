// The CPU backend's entry points: the whole loop of one layer and direction in one call.
#pragma once

#include <string>

#include "../common/params.h"

namespace fusedreg::cpu {

// Runs `body(context, worker, workers)` for worker = 0 ... workers - 1, all of them concurrently, where `workers`
// is the team that the runtime gave: at most `asked`, perhaps 1. Returns when all have returned.
using TeamBody = void (*)(void* context, int worker, int workers);
using RunTeam = void (*)(int asked, TeamBody body, void* context);

// `threads`: the number of threads the runtime allows. Throws std::bad_alloc, nothing else.
void lstm_layer_forward(const ForwardParams& params, int threads, RunTeam run_team);
void lstm_layer_backward(const BackwardParams& params, int threads, RunTeam run_team);

// Roughly, of a forward: what decides how many workers are worth having.
inline double operations_of(const LayerInputs& in) {
  const double steps = static_cast<double>(in.steps > 1 ? in.steps : 1);
  const double products =
      static_cast<double>(4 * (in.input_size + in.projected_size) + (in.weight_hr != nullptr ? in.projected_size : 0));
  return 2.0 * steps * static_cast<double>(in.rows) * static_cast<double>(in.hidden_size) * products;
}

// Of `threads`. Below so much work each another one costs more than it brings.
inline int workers_worth_having(double operations, int threads) {
  const double workers = operations / 2e5;
  return workers < threads ? (workers > 1.0 ? static_cast<int>(workers) : 1) : threads;
}

// The multiply-add rate of one thread in operations a second (two a multiply-add), for benchmarks: the kernels' roof.
double measure_fma_rate(double seconds);

// Of "avx512", "avx2" and "portable": those that were built and run on this processor, best first, comma-separated.
std::string usable_instruction_sets();
// For tests: use this instruction set from now on (process-wide). False where it cannot run here.
bool set_instruction_set(const std::string& name);
std::string get_instruction_set();

}  // namespace fusedreg::cpu
