// The operators' schemas: one contract for the kernels of every device. The fakes of fusedreg/fakes.py and the orders
// of fusedreg/encoding.py follow them.
//
// Shapes are those of fusedreg/layer.py. With an input (M, T, B, I) every tensor that is there has an axis of M models
// in front, results too, and result[m] is the operator of argument[m].
#pragma once

// The 27 tensors that forward and backward share.
#define FUSEDREG_LAYER_TENSORS                                                                                  \
  "Tensor input, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "                        \
  "Tensor? weight_hr, "                                                                                         \
  "Tensor? initial_hidden, Tensor? initial_cell, Tensor? lengths, Tensor? reset, Tensor? seed, "                \
  "Tensor? norm_input_weight, Tensor? norm_input_bias, Tensor? norm_recurrent_weight, "                         \
  "Tensor? norm_recurrent_bias, Tensor? norm_cell_weight, Tensor? norm_cell_bias, "                             \
  "Tensor? hidden_probe, Tensor? cell_probe, "                                                                  \
  "Tensor? running_index, Tensor? running_input_index, Tensor? running_input_mean, Tensor? running_input_var, " \
  "Tensor? running_recurrent_mean, Tensor? running_recurrent_var, Tensor? running_cell_mean, "                  \
  "Tensor? running_cell_var, "

#define FUSEDREG_LAYER_OPTIONS "float[] rates, int[] options, float norm_eps"

namespace fusedreg::stable {

constexpr const char* kForwardSchema =
    "lstm_layer_forward(" FUSEDREG_LAYER_TENSORS FUSEDREG_LAYER_OPTIONS
    ") -> (Tensor output, Tensor final_hidden, Tensor final_cell, Tensor cells, Tensor hidden, Tensor gates, "
    "Tensor input_gates, Tensor input_statistics, Tensor recurrent_statistics, Tensor cell_statistics)";

constexpr const char* kBackwardSchema =
    "lstm_layer_backward(Tensor? grad_output, Tensor? grad_final_hidden, Tensor? grad_final_cell, "
    "Tensor? grad_cells, " FUSEDREG_LAYER_TENSORS
    "Tensor cells, Tensor hidden, Tensor gates, Tensor input_gates, Tensor input_statistics, "
    "Tensor recurrent_statistics, Tensor cell_statistics, " FUSEDREG_LAYER_OPTIONS
    ", bool[] needed) -> (Tensor grad_input, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih, "
    "Tensor grad_bias_hh, Tensor grad_weight_hr, Tensor grad_initial_hidden, Tensor grad_initial_cell, Tensor "
    "grad_norm_input_weight, "
    "Tensor grad_norm_input_bias, Tensor grad_norm_recurrent_weight, Tensor grad_norm_recurrent_bias, "
    "Tensor grad_norm_cell_weight, Tensor grad_norm_cell_bias, Tensor grad_hidden_probe, Tensor grad_cell_probe)";

}  // namespace fusedreg::stable
