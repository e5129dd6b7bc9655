// One instruction set's kernels: this file is compiled once for each, into a namespace of its own.
#include "kernels.h"

#include <time.h>

#include "backward.h"
#include "forward.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

void forward(const ForwardParams& params, int threads, RunTeam run_team) {
  switch (params.in.dtype) {
    case ScalarType::Float32: return Forward<float>::run(params, threads, run_team);
    case ScalarType::Float64: return Forward<double>::run(params, threads, run_team);
    case ScalarType::BFloat16: return Forward<BFloat16>::run(params, threads, run_team);
    case ScalarType::Float16: return Forward<Float16>::run(params, threads, run_team);
  }
}

void backward(const BackwardParams& params, int threads, RunTeam run_team) {
  switch (params.in.dtype) {
    case ScalarType::Float32: return Backward<float>::run(params, threads, run_team);
    case ScalarType::Float64: return Backward<double>::run(params, threads, run_team);
    case ScalarType::BFloat16: return Backward<BFloat16>::run(params, threads, run_team);
    case ScalarType::Float16: return Backward<Float16>::run(params, threads, run_team);
  }
}

static double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Ten independent chains of multiply-adds in registers: more than the units' latency needs.
double measure_fma_rate(double seconds) {
  using V = Vector<float>;
  V chains[10];
  for (int n = 0; n < 10; ++n) chains[n] = broadcast<float>(1.0f + static_cast<float>(n));
  const V factor = broadcast<float>(0.999f), term = broadcast<float>(0.001f);
  const double begin = now();
  double end = begin;
  int64_t rounds = 0;
  for (; end - begin < seconds; end = now()) {
    for (int round = 0; round < 4096; ++round) {
#pragma GCC unroll 10
      for (int n = 0; n < 10; ++n) chains[n] = chains[n] * factor + term;
    }
    rounds += 4096;
  }
  V sum{};
  for (int n = 0; n < 10; ++n) sum += chains[n];
  volatile float keep = sum[0];
  (void)keep;
  return 2.0 * 10 * kWidth<float> * static_cast<double>(rounds) / (end - begin);
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
