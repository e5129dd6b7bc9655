// Barriers and fences that can be switched off one at a time: what tools/mutate_cuda.py puts in their place, each with
// the number of its site. One build holds all mutants.
#pragma once

#include "cuda/device.h"

// The site that is switched off; 0: none. Set by the tool through the library's symbol.
extern "C" __attribute__((visibility("default"))) int fusedreg_mutation;

namespace fusedreg::cuda::mutation {

#define FUSEDREG_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <int site>
void sync_block(FUSEDREG_CALLER) {
  if (fusedreg_mutation != site) fusedreg::cuda::sync_block(file, line);
}

template <int site>
void sync_warp(FUSEDREG_CALLER) {
  if (fusedreg_mutation != site) fusedreg::cuda::sync_warp(file, line);
}

// Left out, the other half would be called without it, which the emulator refuses at once: that would show nothing of
// what the operation is for.
template <int site>
void cluster_arrive(FUSEDREG_CALLER) {
  fusedreg_mutation == site ? cluster_arrive_relaxed(file, line) : fusedreg::cuda::cluster_arrive(file, line);
}

template <int site>
void cluster_wait(FUSEDREG_CALLER) {
  fusedreg_mutation == site ? cluster_pass(file, line) : fusedreg::cuda::cluster_wait(file, line);
}

template <int site>
void fence_device() {
  if (fusedreg_mutation != site) fusedreg::cuda::fence_device();
}

template <int site>
void wait_for_fetched() {
  if (fusedreg_mutation != site) fusedreg::cuda::wait_for_fetched();
}

template <int site>
void store_release(uint32_t* flag, uint32_t value) {
  fusedreg_mutation == site ? store_relaxed(flag, value) : fusedreg::cuda::store_release(flag, value);
}

template <int site>
uint32_t load_acquire(const uint32_t* flag, FUSEDREG_CALLER) {
  return fusedreg_mutation == site ? load_relaxed(flag, file, line) : fusedreg::cuda::load_acquire(flag, file, line);
}

#undef FUSEDREG_CALLER

}  // namespace fusedreg::cuda::mutation
