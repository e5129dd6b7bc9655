// What each instruction set's kernels offer to dispatch.cpp.
#pragma once

#include "lstm_layer.h"

#define FUSEDREG_DECLARE_KERNELS(isa)                                         \
  namespace fusedreg::cpu::isa {                                              \
  void forward(const ForwardParams& params, int threads, RunTeam run_team);   \
  void backward(const BackwardParams& params, int threads, RunTeam run_team); \
  double measure_fma_rate(double seconds);                                    \
  }

FUSEDREG_DECLARE_KERNELS(avx512)
FUSEDREG_DECLARE_KERNELS(avx2)
FUSEDREG_DECLARE_KERNELS(portable)

#undef FUSEDREG_DECLARE_KERNELS
