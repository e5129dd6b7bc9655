// What a recurrent loop is given: everything before it has been computed, everything after it is somebody else's.
//
// The driver (layer.h) makes the input terms before the loop and the parameters' gradients after it, by library
// products over all steps at once. Between the two stands one of three tiers (plan.h), each of which takes these
// structs. All pointers are device memory; names and layouts are those of csrc/common/params.h.
//
// A step is processed at index s. position(s, b) = s < len_b ? (reverse ? len_b - 1 - s : s) : s, so that s = 0 ... T-1
// visits every (t, b) exactly once, padding included: a loop writes all of its results, zeros in padding.
// Padding of anything read here may hold anything, NaN included: never read it, never multiply it by zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "masks.cuh"

namespace fusedreg::cuda {

// What both directions read.
struct LoopInputs {
  LayerInputs in;           // sizes, options, rates; device pointers. `in.seeds` is unused
  MaskSeed seed;            // of the masks inside the loop
  int64_t running_rows;     // rows of the running recurrent and cell statistics: indices are clamped to [-1, rows - 1]
  const void* weight_hh;    // (4H, P) storage, 0 where M_w drops and unscaled elsewhere: masks.cuh, recurrent_scale()
  const void* input_terms;  // (T, B, 4H) compute, by position t: N_r(r), or r without an input norm; padding undefined
  const void* bias;         // (4H,) compute: b_ih + b_hh + layer norm's shifts of the input and recurrent terms,
                            // so that z = N_a(a), gain only, + input_terms + bias
};

// The forward writes out.output, final_hidden, final_cell, cells, hidden, gates, recurrent_statistics and
// cell_statistics, where they are not null, each whole. out.input_gates and out.input_statistics are the driver's.
struct ForwardLoop {
  LoopInputs layer;
  LayerOutputs out;
  void* scratch;  // as many bytes as the tier asked for; contents undefined
  size_t scratch_bytes;
  void* stream;  // cudaStream_t
};

// The backward never writes what the forward saved.
struct BackwardLoop {
  LoopInputs layer;
  LayerOutputs saved;               // hidden: the carried h_s, whether or not it is the output
  const void* gates;                // activated, in their kept form (storage.h), when `activated`;
                                    // else the raw a, (T, B, 4H) compute
  bool activated;                   // gates kept without a norm; otherwise z is rebuilt from a
  const void* grad_output;          // (T, B, P) storage, or null; units contiguous
  int64_t grad_output_step_stride;  // in elements
  int64_t grad_output_row_stride;
  const void* grad_final_hidden;  // (B, P) storage, or null
  const void* grad_final_cell;    // (B, H) compute, or null
  const void* grad_cells;         // (T, B, H) compute, or null
  // Results, each written whole.
  void* grad_recurrent;  // da, (T, B, 4H) storage, by position t, 0 in padding
  void* grad_gates;      // dz, (T, B, 4H) compute, by t, 0 in padding; null unless norm_input or norm_recurrent
  // Null without norm_cell, else (T, B, H) compute, by t, 0 in padding: dL/dN_c and (candidate - mean) * rstd. The
  // driver sums them over rows and steps to the gradients of the cell's gain and shift.
  void* grad_cell_normalised;
  void* cell_normalised;
  void* grad_initial_hidden;  // (B, P) storage; null if not wanted
  void* grad_initial_cell;    // (B, H) compute; null if not wanted
  void* grad_hidden_probe;    // (T, B, P) storage, by t, 0 in padding: what reaches the carried h_s; null if not wanted
  void* grad_cell_probe;      // (T, B, H) compute, likewise of the cell, as params.h says; null if not wanted
  // With a projection, null if the gradient of weight_hr is not wanted: its two factors, (T * B, P) and (T * B, H)
  // storage, 0 in padding, in the order of row_groups.h.
  void* grad_projected;  // what reaches u W_hr^T
  void* unprojected;     // u = o tanh(N_c(candidate))
  void* scratch;
  size_t scratch_bytes;
  void* stream;
};

// Each tier offers, with Choice from plan.h and Products from products.h where it needs a library's product,
//   size_t <tier>_forward_scratch(const LayerInputs&, const Choice&);
//   void <tier>_forward(const ForwardLoop&, const Choice&[, Products&]);
// and the same with "backward".

}  // namespace fusedreg::cuda
