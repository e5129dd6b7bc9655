// From a type that is known when the program runs to one that is known when it is compiled.
#pragma once

#include "../common/params.h"
#include "storage.h"

namespace fusedreg::cuda {

inline ScalarType compute_type(ScalarType storage) {
  return storage == ScalarType::Float64 ? ScalarType::Float64 : ScalarType::Float32;
}

inline int64_t bytes_of(ScalarType type) {
  return type == ScalarType::Float64 ? 8 : type == ScalarType::Float32 ? 4 : 2;
}

// Calls `action` with a value of the storage type, whose type is all it carries.
template <class Action>
void with_storage(ScalarType type, const Action& action) {
  switch (type) {
    case ScalarType::Float32: return action(float{});
    case ScalarType::Float64: return action(double{});
    case ScalarType::BFloat16: return action(BFloat16{});
    case ScalarType::Float16: return action(Float16{});
  }
}

}  // namespace fusedreg::cuda
