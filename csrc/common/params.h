// What a kernel is given: plain structs, shared by every backend, that know nothing of torch.
//
// Names: T steps, B rows, I input features, H hidden units, P units of h (H without a projection). Gates are stacked in
// the order i, f, g, o. A step is processed at index s; t is its position in the input. Forward: t = s; reverse: t =
// len_b - 1 - s.
#pragma once

#include <cstdint>

namespace fusedreg {

enum class ScalarType : int32_t { Float32 = 0, Float64 = 1, BFloat16 = 2, Float16 = 3 };

// Probabilities of dropping (or zoning out), in [0, 1). The order is that of LayerOptions.rates in fusedreg/layer.py.
struct Rates {
  double dropout = 0;  // on this layer's output, so 0 for the last layer
  double input_dropout = 0;
  double hidden_dropout = 0;
  double output_dropout = 0;
  double update_dropout = 0;
  double cell_dropout = 0;
  double weight_dropout = 0;
  double zoneout_hidden = 0;
  double zoneout_cell = 0;
};
constexpr int kNumberOfRates = 9;

enum class NormKind : int32_t { None = 0, Batch = 1, Layer = 2 };

// What the forward keeps for the backward.
enum class Save : int32_t {
  Nothing = 0,    // inference
  Gates = 1,      // the gates after their activations, or with a norm both raw pre-activations, and the cells
  Recompute = 2,  // the cells only: the backward rebuilds the pre-activations with one product over the steps
};

// The order is that of the operator's `options` argument (fusedreg/ops.py, encode_options).
struct Options {
  int32_t layer = 0;
  bool reverse = false;
  bool training = false;
  bool untied_masks = false;          // gate_masks="untied"
  bool update_mask_sequence = false;  // update_mask="sequence"
  bool weight_mask_row = false;       // weight_mask="row"
  bool zoneout_candidate = false;     // zoneout_output="candidate"
  NormKind norm = NormKind::None;
  bool norm_input = false;
  bool norm_recurrent = false;
  bool norm_cell = false;
  bool norm_input_sequence = false;  // input_statistics="sequence"
  bool return_cells = false;
  Save save = Save::Nothing;
  int32_t gradient_groups = 1;  // backward: every parameter's gradient comes once for each such group of rows
};
constexpr int kNumberOfOptions = 15;

// Mean and variance that batch norm reads in evaluation, and at steps with one valid row: rows of `width`
// values (4H; H for the cell) in the compute type. index[s] is the row for step s, or -1 for mean 0, variance 1.
struct RunningStatistics {
  const int64_t* index = nullptr;        // (T,)
  const int64_t* input_index = nullptr;  // (T,)
  const void* input_mean = nullptr;
  const void* input_var = nullptr;
  const void* recurrent_mean = nullptr;
  const void* recurrent_var = nullptr;
  const void* cell_mean = nullptr;
  const void* cell_var = nullptr;
};

// Gains and shifts, in the storage type: (4H,) for input and recurrent, (H,) for the cell; null where absent.
struct NormParameters {
  const void* input_weight = nullptr;
  const void* input_bias = nullptr;
  const void* recurrent_weight = nullptr;
  const void* recurrent_bias = nullptr;
  const void* cell_weight = nullptr;
  const void* cell_bias = nullptr;
};

// The inputs of both directions. "Storage" is dtype; "compute" is float64 for float64, else float32.
// Everything is contiguous except `input`, whose features are contiguous and whose steps and rows are strided.
struct LayerInputs {
  ScalarType dtype = ScalarType::Float32;
  int64_t steps = 0, rows = 0, input_size = 0, hidden_size = 0, projected_size = 0;
  Rates rates;
  Options options;
  double norm_eps = 0;
  // Rows are `groups` groups of consecutive rows, each with a (seed, first_step): its key, rows counted from 0, steps
  // counted from first_step. Weights are drawn from the first group's seed. CPU: `seeds` (groups, 2), null where
  // nothing is drawn. A device reads the operator's tensor itself: one seed, or with `grouped_seed` such pairs.
  int64_t groups = 1;
  const int64_t* seeds = nullptr;
  bool grouped_seed = false;
  const void* input = nullptr;                          // (T, B, I) storage
  int64_t input_step_stride = 0, input_row_stride = 0;  // in elements
  const void* weight_ih = nullptr;                      // (4H, I) storage
  const void* weight_hh = nullptr;                      // (4H, P) storage
  const void* bias_ih = nullptr;                        // (4H,) storage, or null
  const void* bias_hh = nullptr;                        // (4H,) storage, or null
  const void* weight_hr = nullptr;                      // (P, H) storage, or null without a projection
  const void* initial_hidden = nullptr;                 // (B, P) storage, or null for zeros
  const void* initial_cell = nullptr;                   // (B, H) compute, or null for zeros
  const int64_t* lengths = nullptr;                     // (B,), clamped to [0, T] by the kernel; null: all T
  const bool* reset = nullptr;                          // (T, B), or null
  NormParameters norm;
  RunningStatistics running;
};

// What the forward writes. Null where not wanted; every element of what is not null is written.
struct LayerOutputs {
  void* output = nullptr;        // (T, B, P) storage: y, 0 in padding
  void* final_hidden = nullptr;  // (B, P) storage
  void* final_cell = nullptr;    // (B, H) compute
  void* cells = nullptr;         // (T, B, H) compute: the carried c_s at position t, 0 in padding
  void* hidden = nullptr;        // (T, B, P) storage: the carried h_s, 0 in padding; only where it differs from output
  // (T, B, 4H): i, f, g, o activated; with a norm the raw a = h W_hh^T; 0 in padding. Of the compute type, but of
  // 16-bit fixed point (int16) for activated gates beside 16-bit inputs.
  void* gates = nullptr;
  void* input_gates = nullptr;  // (T, B, 4H) compute: the raw r = x W_ih^T, only with a norm; 0 in padding
  // [:, 0] the mean and [:, 1] the biased variance used, in the compute type. Batch norm: indexed by the processed
  // step s: input (T or 1, 2, 4H), recurrent (T, 2, 4H), cell (T, 2, H), 0 at steps no row reaches.
  // Layer norm: (T, 2, B) each, indexed by position t, 0 in padding.
  void* input_statistics = nullptr;
  void* recurrent_statistics = nullptr;
  void* cell_statistics = nullptr;
};

struct ForwardParams {
  LayerInputs in;
  LayerOutputs out;
};

// The backward reads what the forward wrote (in `saved`, never written) and the gradients of its results.
struct BackwardParams {
  LayerInputs in;
  LayerOutputs saved;                 // hidden: the carried h_s, whether or not it is the output
  const void* grad_output = nullptr;  // (T, B, P) storage, or null
  int64_t grad_output_step_stride = 0, grad_output_row_stride = 0;  // in elements; units contiguous
  const void* grad_final_hidden = nullptr;                          // (B, P) storage, or null
  const void* grad_final_cell = nullptr;                            // (B, H) compute, or null
  const void* grad_cells = nullptr;                                 // (T, B, H) compute, or null
  // Results; null where not wanted. With gradient_groups > 1 those of parameters have that many in front.
  void* grad_input = nullptr;              // (T, B, I) storage, 0 in padding
  void* grad_weight_ih = nullptr;          // (4H, I) storage
  void* grad_weight_hh = nullptr;          // (4H, P) storage
  void* grad_bias = nullptr;               // (4H,) storage: the gradient of each of the two biases
  void* grad_weight_hr = nullptr;          // (P, H) storage
  void* grad_initial_hidden = nullptr;     // (B, P) storage
  void* grad_initial_cell = nullptr;       // (B, H) compute
  void* grad_norm_input_weight = nullptr;  // (4H,) storage, and so on
  void* grad_norm_input_bias = nullptr;
  void* grad_norm_recurrent_weight = nullptr;
  void* grad_norm_recurrent_bias = nullptr;
  void* grad_norm_cell_weight = nullptr;  // (H,)
  void* grad_norm_cell_bias = nullptr;
  // By position t, 0 in padding: what reaches the carried h_s, and what reaches the cell of step s wherever it is read,
  // by h~_s and as the carried c_s.
  void* grad_hidden_probe = nullptr;  // (T, B, P) storage
  void* grad_cell_probe = nullptr;    // (T, B, H) compute
};

}  // namespace fusedreg
