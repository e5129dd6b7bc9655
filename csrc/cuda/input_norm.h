// N_r, the norm of the input terms: of all steps at once, before the loop, and on the way back after it.
//
// Batch norm takes the statistics of each processed step over the rows that reach it, or of all steps together; layer
// norm those of each row over its 4H values. N_r has a gain alone: layer norm's shift is part of the bias.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/params.h"

namespace fusedreg::cuda {

// How many rows reach each step: (T + 1,) int64, of which the last is the sum of the others. Batch norm alone needs it.
void count_rows(const LayerInputs& in, int64_t* counts, void* stream);

struct InputNorm {
  LayerInputs in;
  int64_t running_rows;   // of the input's running statistics: indices are clamped to [-1, rows - 1]
  const int64_t* counts;  // with batch norm
  const void* raw;        // r, (T, B, 4H) compute; padding is not read
  void* statistics;       // of params.h: the forward writes it, the backward reads it; null: not wanted
};

// Bytes of scratch that normalize_inputs needs.
size_t normalize_inputs_scratch(const LayerInputs& in);

// `normalised`, (T, B, 4H) compute = N_r(r); may be `raw`. Padding of the result is undefined.
void normalize_inputs(const InputNorm& norm, void* normalised, void* scratch, void* stream);

// The same on the way back, with the statistics that the forward used.
void normalize_inputs_again(const InputNorm& norm, void* normalised, void* stream);

// From dz (`grad`, (T, B, 4H) compute) to dr (`result`, the same in storage, 0 in padding). `totals`, which pooled
// statistics alone need: (2, 4H) compute, the sums over all rows and steps of dz and of dz times the normalised r.
void input_norm_backward(const InputNorm& norm, const void* grad, const void* totals, void* result, void* stream);

}  // namespace fusedreg::cuda
