// One call of an operator, up to the point where kernels start: its arguments checked, its results allocated, both as
// the structs that kernels take. The same for every device.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "layer_arguments.h"

namespace fusedreg::stable {

// An operator's results, in the schema's order. An absent one is an empty tensor of shape (0,), never a view of
// another.
class Results {
 public:
  explicit Results(const LayerArguments& layer) : layer_(layer) {}

  void* add(bool wanted, const Shape& shape, ScalarType type) {
    tensors_.push_back(wanted ? empty(layer_.input, shape, type) : absent(layer_.input, type));
    return wanted ? tensors_.back().mutable_data_ptr() : nullptr;
  }
  void zero() {
    for (Tensor& tensor : tensors_) torch::stable::zero_(tensor);
  }
  Tensor& operator[](size_t index) { return tensors_[index]; }
  void give(StableIValue* stack) {
    for (const Tensor& tensor : tensors_) *stack++ = torch::stable::detail::from(tensor);
  }

 private:
  const LayerArguments& layer_;
  std::vector<Tensor> tensors_;
};

class ForwardCall {
 public:
  static constexpr const char* kName = "fusedreg::lstm_layer_forward";

  ForwardCall(StableIValue* stack, Place place) : ForwardCall(ArgumentReader(stack), place) {}
  ForwardCall(const ForwardCall&) = delete;

  LayerArguments layer;
  Results results;
  ForwardParams params;

 private:
  ForwardCall(ArgumentReader reader, Place place) : layer(kName, reader, /*with_saved=*/false), results(layer) {
    params.in = layer.check(place);
    if (layer.options.gradient_groups > 1) {
      fail(kName, ": options[14]: expected 0 or 1 gradient groups in the forward, got ", layer.options.gradient_groups);
    }
    allocate();
  }

  void allocate() {
    const Options& options = layer.options;
    const Rates& rates = layer.rates;
    const LayerShapes& shapes = layer.shapes;
    const bool save = options.save != Save::Nothing;
    const bool save_gates = options.save == Save::Gates;
    const bool has_norm = options.norm != NormKind::None;
    // Otherwise the output is the carried h itself, and the backward is given the output.
    const bool output_differs = (options.training && (rates.output_dropout > 0 || rates.dropout > 0)) ||
                                (options.zoneout_candidate && rates.zoneout_hidden > 0);
    // A batch norm's are wanted in training whether or not there will be a backward: the buffers are updated from them.
    const bool statistics = has_norm && (save || (options.norm == NormKind::Batch && options.training));
    const int64_t width = 4 * shapes.hidden_size;

    LayerOutputs& out = params.out;
    out.output = results.add(true, shapes.hiddens(), shapes.storage);
    out.final_hidden = results.add(true, shapes.hidden(), shapes.storage);
    out.final_cell = results.add(true, shapes.cell(), shapes.compute);
    out.cells = results.add(save || options.return_cells, shapes.cells(), shapes.compute);
    out.hidden = results.add(save && output_differs, shapes.hiddens(), shapes.storage);
    out.gates = results.add(save_gates, shapes.gates(), shapes.kept_gates(options));
    out.input_gates = results.add(save_gates && has_norm, shapes.gates(), shapes.compute);
    out.input_statistics =
        results.add(statistics && options.norm_input, shapes.statistics(options, true, width), shapes.compute);
    out.recurrent_statistics =
        results.add(statistics && options.norm_recurrent, shapes.statistics(options, false, width), shapes.compute);
    out.cell_statistics = results.add(statistics && options.norm_cell,
                                      shapes.statistics(options, false, shapes.hidden_size), shapes.compute);
  }
};

// Which of the 16 results of the backward are wanted, in their order.
enum Gradient {
  kInput,
  kWeightIh,
  kWeightHh,
  kBiasIh,
  kBiasHh,
  kWeightHr,
  kInitialHidden,
  kInitialCell,
  kNormInputWeight,
  kNormInputBias,
  kNormRecurrentWeight,
  kNormRecurrentBias,
  kNormCellWeight,
  kNormCellBias,
  kHiddenProbe,
  kCellProbe,
  kNumberOfGradients
};

class BackwardCall {
 public:
  static constexpr const char* kName = "fusedreg::lstm_layer_backward";

  BackwardCall(StableIValue* stack, Place place) : BackwardCall(ArgumentReader(stack), place) {}
  BackwardCall(const BackwardCall&) = delete;

  OptionalTensor grad_output, grad_final_hidden, grad_final_cell, grad_cells;
  LayerArguments layer;
  Results results;
  BackwardParams params;
  // Where both biases' gradients are wanted: the second one, which is to hold what params.grad_bias does.
  void* second_grad_bias = nullptr;

 private:
  BackwardCall(ArgumentReader reader, Place place)
      : layer(kName, take_gradients(reader), /*with_saved=*/true), results(layer) {
    const auto needed = reader.take<std::vector<bool>>();
    params.in = layer.check(place);
    params.saved = layer.check_saved();
    if (needed.size() != kNumberOfGradients) {
      fail(kName, ": needed: expected ", int{kNumberOfGradients}, " flags, got ", needed.size());
    }
    const int64_t groups = layer.options.gradient_groups;
    if (groups > 1) layer.check_groups("options[14]", groups);
    check_gradients();
    allocate(needed);
  }

  ArgumentReader& take_gradients(ArgumentReader& reader) {
    reader.take_into(grad_output, grad_final_hidden, grad_final_cell, grad_cells);
    return reader;
  }

  void check_gradients() {
    const LayerShapes& shapes = layer.shapes;
    if (grad_output) {
      layer.expect.check_strided("grad_output", *grad_output, shapes.storage, "(T, B, P)", shapes.hiddens());
      params.grad_output = pointer(grad_output);
      params.grad_output_step_stride = grad_output->stride(0);
      params.grad_output_row_stride = grad_output->stride(1);
    }
    layer.expect.check_contiguous("grad_final_hidden", grad_final_hidden, shapes.storage, "(B, P)", shapes.hidden());
    layer.expect.check_contiguous("grad_final_cell", grad_final_cell, shapes.compute, "(B, H)", shapes.cell());
    layer.expect.check_contiguous("grad_cells", grad_cells, shapes.compute, "(T, B, H)", shapes.cells());
    params.grad_final_hidden = pointer(grad_final_hidden);
    params.grad_final_cell = pointer(grad_final_cell);
    params.grad_cells = pointer(grad_cells);
  }

  void allocate(const std::vector<bool>& needed) {
    const LayerShapes& shapes = layer.shapes;
    const ScalarType storage = shapes.storage;
    const int64_t hidden_size = shapes.hidden_size;
    const int64_t groups = layer.options.gradient_groups;
    const auto of_parameter = [groups](std::initializer_list<int64_t> sizes) {
      Shape shape = sizes;
      if (groups > 1) shape.insert(shape.begin(), groups);
      return shape;
    };
    const Shape gates = of_parameter({4 * hidden_size});
    const Shape units = of_parameter({hidden_size});
    params.grad_input = results.add(needed[kInput], {shapes.steps, shapes.rows, shapes.input_size}, storage);
    params.grad_weight_ih = results.add(needed[kWeightIh], of_parameter({4 * hidden_size, shapes.input_size}), storage);
    params.grad_weight_hh =
        results.add(needed[kWeightHh], of_parameter({4 * hidden_size, shapes.projected_size}), storage);
    void* const grad_bias_ih = results.add(needed[kBiasIh], gates, storage);
    void* const grad_bias_hh = results.add(needed[kBiasHh], gates, storage);
    params.grad_bias = grad_bias_ih != nullptr ? grad_bias_ih : grad_bias_hh;
    second_grad_bias = grad_bias_ih != nullptr ? grad_bias_hh : nullptr;
    // What is not there leaves its gradient to be zeroed here: a projection, and below the parameters of a norm.
    const auto add_if = [&](Gradient which, const Shape& shape, bool there) -> void* {
      void* const data = results.add(needed[which], shape, storage);
      if (there) return data;
      torch::stable::zero_(results[which]);
      return nullptr;
    };
    params.grad_weight_hr =
        add_if(kWeightHr, of_parameter({shapes.projected_size, hidden_size}), params.in.weight_hr != nullptr);
    params.grad_initial_hidden = results.add(needed[kInitialHidden], shapes.hidden(), storage);
    params.grad_initial_cell = results.add(needed[kInitialCell], shapes.cell(), shapes.compute);
    const Options& on = layer.options;  // without a norm all of its sites are off
    params.grad_norm_input_weight = add_if(kNormInputWeight, gates, on.norm_input);
    params.grad_norm_input_bias = add_if(kNormInputBias, gates, on.norm_input);
    params.grad_norm_recurrent_weight = add_if(kNormRecurrentWeight, gates, on.norm_recurrent);
    params.grad_norm_recurrent_bias = add_if(kNormRecurrentBias, gates, on.norm_recurrent);
    params.grad_norm_cell_weight = add_if(kNormCellWeight, units, on.norm_cell);
    params.grad_norm_cell_bias = add_if(kNormCellBias, units, on.norm_cell);
    params.grad_hidden_probe = results.add(needed[kHiddenProbe], shapes.hiddens(), storage);
    params.grad_cell_probe = results.add(needed[kCellProbe], shapes.cells(), shapes.compute);
  }
};

}  // namespace fusedreg::stable
