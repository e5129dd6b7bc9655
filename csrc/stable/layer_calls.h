// A call of an operator, up to the point where kernels start: its arguments checked, its results allocated, both as the
// structs that kernels take. The same for every device.
#pragma once

#include <initializer_list>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "layer_arguments.h"

namespace fusedreg::stable {

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

// An operator's results, in the schema's order. An absent one is an empty tensor of shape (0,), never a view of
// another. Where there are models all results have an axis of them in front, and each model has its part.
class Results {
 public:
  // On the device of `like`.
  Results(Tensor like, std::optional<int64_t> models) : like_(std::move(like)), models_(models) {
    tensors_.reserve(kNumberOfGradients);  // the most that there are
  }

  // The results of this model are added next; the first one's allocate for all.
  void begin(int64_t model) {
    model_ = model;
    next_ = 0;
  }
  void* add(bool wanted, const Shape& shape, ScalarType type) {
    if (next_ == tensors_.size()) tensors_.push_back(allocate(wanted, shape, type));
    const Tensor& tensor = tensors_[next_++];
    if (!wanted) return nullptr;
    char* const data = static_cast<char*>(tensor.mutable_data_ptr());
    return model_ == 0 ? data : data + model_ * (bytes_of(tensor) / *models_);
  }
  // Of all models at once, what was added last, and everything.
  void zero_last() {
    if (model_ == 0) torch::stable::zero_(tensors_[next_ - 1]);
  }
  void zero() {
    for (Tensor& tensor : tensors_) torch::stable::zero_(tensor);
  }
  const Tensor& operator[](size_t index) const { return tensors_[index]; }
  void give(StableIValue* stack) {
    for (const Tensor& tensor : tensors_) *stack++ = torch::stable::detail::from(tensor);
  }

  static int64_t bytes_of(const Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.element_size()); }

 private:
  Tensor allocate(bool wanted, const Shape& shape, ScalarType type) const {
    if (!models_) return wanted ? empty(like_, shape, type) : absent(like_, type);
    Shape of_all{*models_};
    if (wanted) {
      of_all.insert(of_all.end(), shape.begin(), shape.end());
    } else {
      of_all.push_back(0);
    }
    return empty(like_, of_all, type);
  }

  Tensor like_;
  std::optional<int64_t> models_;
  int64_t model_ = 0;
  size_t next_ = 0;
  std::vector<Tensor> tensors_;
};

class ForwardCall {
 public:
  static constexpr const char* kName = "fusedreg::lstm_layer_forward";

  // Of the operator's arguments, as they come; `prepare` comes next.
  explicit ForwardCall(ArgumentReader reader) : layer(kName, reader, /*with_saved=*/false) {}
  // One model's, out of the call of all models.
  ForwardCall(const ForwardCall& all, int64_t model) : layer(all.layer, model) {}
  ForwardCall(const ForwardCall&) = delete;

  void check_models(int64_t models) { layer.check_models(models); }

  // Checks the arguments, and makes `params` of them and of the results that it adds.
  void prepare(Place place, Results& results) {
    params.in = layer.check(place);
    if (layer.options.gradient_groups > 1) {
      fail(kName, ": options[14]: expected 0 or 1 gradient groups in the forward, got ", layer.options.gradient_groups);
    }
    allocate(results);
  }

  LayerArguments layer;
  ForwardParams params;

 private:
  void allocate(Results& results) {
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

class BackwardCall {
 public:
  static constexpr const char* kName = "fusedreg::lstm_layer_backward";

  explicit BackwardCall(ArgumentReader reader) : layer(kName, take_gradients(reader), /*with_saved=*/true) {
    reader.take_into(needed_);
  }
  BackwardCall(const BackwardCall& all, int64_t model)
      : grad_output(all.grad_output),
        grad_final_hidden(all.grad_final_hidden),
        grad_final_cell(all.grad_final_cell),
        grad_cells(all.grad_cells),
        layer(all.layer, model),
        needed_(all.needed_) {
    visit_gradients([model](const char* /*name*/, OptionalTensor& tensor) { select_model(tensor, model); });
  }
  BackwardCall(const BackwardCall&) = delete;

  void check_models(int64_t models) {
    layer.check_models(models);
    visit_gradients(
        [models](const char* name, const OptionalTensor& tensor) { check_model_axis(kName, name, tensor, models); });
  }

  void prepare(Place place, Results& results) {
    params.in = layer.check(place);
    params.saved = layer.check_saved();
    if (needed_.size() != kNumberOfGradients) {
      fail(kName, ": needed: expected ", int{kNumberOfGradients}, " flags, got ", needed_.size());
    }
    const int64_t groups = layer.options.gradient_groups;
    if (groups > 1) layer.check_groups("options[14]", groups);
    check_gradients();
    allocate(results);
  }

  OptionalTensor grad_output, grad_final_hidden, grad_final_cell, grad_cells;
  LayerArguments layer;
  BackwardParams params;
  // Where both biases' gradients are wanted: the second one, which is to hold what params.grad_bias does.
  void* second_grad_bias = nullptr;

 private:
  template <typename Visit>
  void visit_gradients(const Visit& visit) {
    visit("grad_output", grad_output);
    visit("grad_final_hidden", grad_final_hidden);
    visit("grad_final_cell", grad_final_cell);
    visit("grad_cells", grad_cells);
  }

  ArgumentReader& take_gradients(ArgumentReader& reader) {
    visit_gradients([&reader](const char* /*name*/, OptionalTensor& tensor) { reader.take_into(tensor); });
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

  void allocate(Results& results) {
    const std::vector<bool>& needed = needed_;
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
      results.zero_last();
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

  std::vector<bool> needed_;
};

// What a call of an operator comes to: one call, or one for each of the models, all of one size. Arguments are checked
// and results allocated; kernels are to run next.
template <typename Call>
class Calls {
 public:
  Calls(StableIValue* stack, Place place)
      : all_(ArgumentReader(stack)), models_(all_.layer.models()), results(all_.layer.input, models_) {
    if (!models_) {
      all_.prepare(place, results);
      return;
    }
    all_.check_models(*models_);
    for (int64_t model = 0; model < *models_; ++model) {
      results.begin(model);
      each_.push_back(std::make_unique<Call>(all_, model));
      each_.back()->prepare(place, results);
    }
    // Results have shapes also without a model: those of one that is not run.
    if (*models_ == 0) Call(all_, 0).prepare(place, results);
  }

  const Tensor& input() const { return all_.layer.input; }
  int64_t count() const { return models_ ? *models_ : 1; }
  Call& operator[](int64_t index) { return models_ ? *each_[index] : all_; }
  // Whether there is something for kernels to do. Else the results are zeros.
  bool have_work() { return count() > 0 && (*this)[0].layer.shapes.rows > 0; }

 private:
  Call all_;  // as the arguments came
  std::optional<int64_t> models_;
  std::vector<std::unique_ptr<Call>> each_;  // the checked arguments have pointers to themselves

 public:
  Results results;
};

}  // namespace fusedreg::stable
