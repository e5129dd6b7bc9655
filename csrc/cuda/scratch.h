// Scratch memory: one block, given by the caller, dealt out piece by piece. The same code first measures, then takes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedreg::cuda {

class Scratch {
 public:
  // Null: nothing is dealt out, the size alone is measured.
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

  void* take(int64_t bytes) {
    const size_t at = used_;
    used_ += (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment;
    return memory_ == nullptr ? nullptr : memory_ + at;
  }
  void* take_if(bool wanted, int64_t bytes) { return wanted ? take(bytes) : nullptr; }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlignment = 256;  // what a library's fastest products ask for
  char* memory_;
  size_t used_ = 0;
};

}  // namespace fusedreg::cuda
