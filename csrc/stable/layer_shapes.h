// Shapes and types of one layer's tensors.
#pragma once

#include <cstdint>

#include "../common/params.h"
#include "tensors.h"

namespace fusedreg::stable {

// What both the checks and the allocations go by.
struct LayerShapes {
  ScalarType storage, compute;
  int64_t steps, rows, input_size, hidden_size, projected_size;

  // Activated gates beside 16-bit inputs are kept in fixed point; everything else of a gate in the compute type.
  ScalarType kept_gates(const Options& options) const {
    const bool narrow = storage != compute;
    return narrow && options.norm == NormKind::None ? ScalarType::Short : compute;
  }
  Shape gates() const { return {steps, rows, 4 * hidden_size}; }
  Shape hiddens() const { return {steps, rows, projected_size}; }
  Shape hidden() const { return {rows, projected_size}; }
  Shape cells() const { return {steps, rows, hidden_size}; }
  Shape cell() const { return {rows, hidden_size}; }
  // Batch norm: one row a processed step, or one in all; layer norm: one value a step and row.
  Shape statistics(const Options& options, bool input, int64_t width) const {
    if (options.norm == NormKind::Layer) return {steps, 2, rows};
    return {input && options.norm_input_sequence ? 1 : steps, 2, width};
  }
};

}  // namespace fusedreg::stable
