// An operator's arguments, off the dispatcher's stack.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fusedreg::stable {

// Takes an operator's arguments off the dispatcher's stack, in the schema's order; each is owned once taken.
class ArgumentReader {
 public:
  explicit ArgumentReader(StableIValue* stack) : next_(stack) {}

  template <typename T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  template <typename... T>
  void take_into(T&... targets) {
    ((targets = take<T>()), ...);
  }

 private:
  StableIValue* next_;
};

}  // namespace fusedreg::stable
