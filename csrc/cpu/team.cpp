#include "team.h"

#include <sched.h>

namespace fusedreg::cpu {
namespace {

constexpr int kSpins = 2000;

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // drains the pipeline, which takes a while, as x86's pause does: most take "yield" for nothing
#endif
}

}  // namespace

void Barrier::wait(int workers) {
  if (workers == 1) return;
  const unsigned generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == workers - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < kSpins) {
      pause_briefly();
    } else {
      sched_yield();
    }
  }
}

}  // namespace fusedreg::cpu
