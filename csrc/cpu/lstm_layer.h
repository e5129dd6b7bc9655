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

// The multiply-add rate of one thread in operations a second (two a multiply-add), for benchmarks: the kernels' roof.
double measure_fma_rate(double seconds);

// Of "avx512", "avx2" and "portable": those that were built and run on this processor, best first, comma-separated.
std::string usable_instruction_sets();
// For tests: use this instruction set from now on (process-wide). False where it cannot run here.
bool set_instruction_set(const std::string& name);
std::string get_instruction_set();

}  // namespace fusedreg::cpu
