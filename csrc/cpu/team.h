// The workers of one call, and the barrier between them.
#pragma once

#include <atomic>

namespace fusedreg::cpu {

// Spins briefly, then yields: with more workers than processors, whoever is waited for must get to run.
class Barrier {
 public:
  void wait(int workers);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> generation_{0};
};

}  // namespace fusedreg::cpu
