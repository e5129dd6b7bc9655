// Fibers: stacks to run on and the switch between them. A switch saves what the calling convention asks a function to
// save and nothing else, no signal mask, so that it costs a few nanoseconds instead of a system call.
#pragma once

#include <cstddef>

namespace fusedreg::cuda::emulation {

// Leaves the running fiber, storing its stack pointer in `*from`, and goes on where `to` was stored.
extern "C" void fusedreg_emulation_switch(void** from, void* to);

// Stacks of one size, mapped together and kept between launches. Memory is taken page by page as it is touched.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();

  void reserve(size_t count);
  // A stack pointer that, switched to, starts `entry` on stack `index`. `entry` must not return.
  void* prepare(size_t index, void (*entry)());

 private:
  static constexpr size_t kBytes = 128 * 1024;
  char* memory_ = nullptr;
  size_t count_ = 0;
};

}  // namespace fusedreg::cuda::emulation
