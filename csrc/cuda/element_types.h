// From a type that is known when the program runs to one that is known when it is compiled.
#pragma once

#include <cstddef>

#include "../common/params.h"
#include "storage.h"

namespace fusedreg::cuda {

inline bool is_narrow(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Float16; }
inline ScalarType compute_type(ScalarType type) { return is_narrow(type) ? ScalarType::Float32 : type; }
inline size_t bytes_of(ScalarType type) { return is_narrow(type) ? 2 : type == ScalarType::Float64 ? 8 : 4; }

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
