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

// "avx512", "avx2" or "portable": what this processor supports, best first; all that this file was built with.
const char* best_instruction_set();
// For tests: use this instruction set from now on (process-wide). False where it cannot run here.
bool set_instruction_set(const std::string& name);
std::string get_instruction_set();

}  // namespace fusedreg::cpu
