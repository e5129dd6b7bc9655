// Scratch memory: one block, given by the caller, dealt out piece by piece. The same code first measures, then takes.
#pragma once

#include "element_types.h"

namespace fusedreg::cuda {

class Scratch {
 public:
  // Null: nothing is dealt out, the size alone is measured.
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

  void* take_bytes(size_t bytes) {
    const size_t at = used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return memory_ == nullptr ? nullptr : memory_ + at;
  }
  void* take(int64_t count, ScalarType type) { return take_bytes(static_cast<size_t>(count) * bytes_of(type)); }
  void* take_if(bool wanted, int64_t count, ScalarType type) { return wanted ? take(count, type) : nullptr; }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlignment = 256;  // what a library's fastest products ask for
  char* memory_;
  size_t used_ = 0;
};

}  // namespace fusedreg::cuda
