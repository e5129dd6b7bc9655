// The arguments that the forward and the backward of a layer share: read from the stack, checked, made into structs.
//
// An operator takes one layer, or M layers of one shape with the same options: models, such as those of an ensemble.
// Every tensor then has an axis of the models in front. Checks and kernels see one model at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../common/params.h"
#include "argument_reader.h"
#include "layer_options.h"
#include "layer_shapes.h"
#include "tensors.h"

namespace fusedreg::stable {

// The sites of the normalisation, in the order of the tensors' names.
struct NormTensors {
  OptionalTensor weight, bias, running_mean, running_var;
};
struct NormNames {
  const char *weight, *bias, *running_mean, *running_var;
};
constexpr NormNames kNormNames[] = {
    {"norm_input_weight", "norm_input_bias", "running_input_mean", "running_input_var"},
    {"norm_recurrent_weight", "norm_recurrent_bias", "running_recurrent_mean", "running_recurrent_var"},
    {"norm_cell_weight", "norm_cell_bias", "running_cell_mean", "running_cell_var"},
};

struct SavedTensors {
  Tensor cells, hidden, gates, input_gates, input_statistics, recurrent_statistics, cell_statistics;
};

// Where the tensors are, and so whether their values can be looked at here. On a device they are not: a read would wait
// for it, and could not be captured in a graph. Kernels clamp what they read there.
enum class Place {
  Cpu,
  Cuda,
  Emulated,  // of CUDA, on CPU tensors
};

class LayerArguments {
 public:
  LayerArguments(const char* operator_name, ArgumentReader& reader, bool with_saved) : name_(operator_name) {
    if (with_saved) saved_.emplace();
    visit_tensors([&reader](const char* /*name*/, auto& tensor) { reader.take_into(tensor); });
    reader.take_into(rates_, options_, norm_eps_);
  }

  // One model's, out of all models'.
  LayerArguments(const LayerArguments& all, int64_t model) : LayerArguments(all) {
    visit_tensors([model](const char* /*name*/, auto& tensor) { select_model(tensor, model); });
  }

  // How many models there are; nothing where tensors have no axis of models.
  std::optional<int64_t> models() const {
    return input.dim() == kRank + 1 ? std::optional<int64_t>(input.size(0)) : std::nullopt;
  }
  void check_models(int64_t models) {
    visit_tensors([&](const char* name, const auto& tensor) { check_model_axis(name_, name, tensor, models); });
  }

  // Checks everything but the saved tensors. The pointers are valid as long as this object lives.
  LayerInputs check(Place place) {
    place_ = place;
    read_options();
    read_shapes();
    const int64_t gates = 4 * shapes.hidden_size;
    expect.check_strided("input", input, shapes.storage, "(T, B, I)", shape_of(input));
    expect.check_contiguous("weight_ih", weight_ih_, shapes.storage, "(4H, I)", {gates, shapes.input_size});
    expect.check_contiguous("weight_hh", weight_hh_, shapes.storage, weight_hr_ ? "(4H, P)" : "(4H, H)",
                            {gates, shapes.projected_size});
    expect.check_contiguous("bias_ih", bias_ih_, shapes.storage, "(4H,)", {gates});
    expect.check_contiguous("bias_hh", bias_hh_, shapes.storage, "(4H,)", {gates});
    expect.check_contiguous("weight_hr", weight_hr_, shapes.storage, "(P, H)",
                            {shapes.projected_size, shapes.hidden_size});
    expect.check_contiguous("initial_hidden", initial_hidden_, shapes.storage, "(B, P)", shapes.hidden());
    expect.check_contiguous("initial_cell", initial_cell_, shapes.compute, "(B, H)", shapes.cell());
    expect.check_contiguous("lengths", lengths_, ScalarType::Long, "(B,)", {shapes.rows});
    expect.check_contiguous("reset", reset_, ScalarType::Bool, "(T, B)", {shapes.steps, shapes.rows});
    if (options.norm != NormKind::None) check_norm_parameters();
    if (options.norm == NormKind::Batch) check_running_statistics();
    // Probes are not read: any strides will do.
    if (hidden_probe_) expect.check("hidden_probe", *hidden_probe_, shapes.storage, "(T, B, P)", shapes.hiddens());
    if (cell_probe_) expect.check("cell_probe", *cell_probe_, shapes.compute, "(T, B, H)", shapes.cells());
    if (draws()) check_seed();
    return pointers();
  }

  // The saved tensors, of which those that the options do not ask for are empty, and not looked at.
  LayerOutputs check_saved() {
    if (options.save == Save::Nothing) fail(name_, ": options: expected a forward that saved for the backward");
    const bool has_norm = options.norm != NormKind::None;
    const bool has_gates = options.save == Save::Gates;
    LayerOutputs saved;
    saved.cells = checked_saved("cells", saved_->cells, shapes.compute, shapes.cells(), true);
    saved.hidden = checked_saved("hidden", saved_->hidden, shapes.storage, shapes.hiddens(), true);
    saved.gates = checked_saved("gates", saved_->gates, shapes.kept_gates(options), shapes.gates(), has_gates);
    saved.input_gates =
        checked_saved("input_gates", saved_->input_gates, shapes.compute, shapes.gates(), has_gates && has_norm);
    const int64_t gates = 4 * shapes.hidden_size;
    saved.input_statistics = checked_saved("input_statistics", saved_->input_statistics, shapes.compute,
                                           shapes.statistics(options, true, gates), has_norm && options.norm_input);
    saved.recurrent_statistics =
        checked_saved("recurrent_statistics", saved_->recurrent_statistics, shapes.compute,
                      shapes.statistics(options, false, gates), has_norm && options.norm_recurrent);
    saved.cell_statistics =
        checked_saved("cell_statistics", saved_->cell_statistics, shapes.compute,
                      shapes.statistics(options, false, shapes.hidden_size), has_norm && options.norm_cell);
    return saved;
  }

  const char* name() const { return name_; }

  // On a device: the seed's place, or null where nothing is drawn; rows of the running statistics that kernels clamp
  // their indices to, of the input terms and of the others.
  const int64_t* seed_pointer() const { return draws() ? static_cast<const int64_t*>(pointer(*seed_)) : nullptr; }
  int64_t running_input_rows() const { return running_rows_[0]; }
  int64_t running_rows() const { return std::min(running_rows_[1], running_rows_[2]); }

  // Options and rates as whole numbers, for whoever remembers what depends on them.
  void add_options(std::vector<int64_t>& numbers) const {
    numbers.insert(numbers.end(), options_.begin(), options_.end());
    for (const double rate : rates_) {
      int64_t bits = 0;
      static_assert(sizeof(bits) == sizeof(rate));
      std::memcpy(&bits, &rate, sizeof(bits));
      numbers.push_back(bits);
    }
  }

  // Fails unless the rows are `groups` groups of as many rows, which have no statistics in common.
  void check_groups(const char* argument, int64_t groups) const {
    if (groups < 1 || shapes.rows % groups != 0) {
      fail(name_, ": ", argument, ": expected a number of groups that divides the ", shapes.rows, " rows, got ",
           groups);
    }
    if (groups > 1 && options.training && options.norm == NormKind::Batch) {
      fail(name_, ": ", argument, ": expected one group with a batch norm in training, whose statistics are over all ",
           "rows, got ", groups, "; call once a group");
    }
  }

  Tensor input;
  Options options;
  Rates rates;
  LayerShapes shapes{};
  Expectation expect{};

 private:
  static constexpr int64_t kRank = 3;                   // of (T, B, I)
  static constexpr int64_t kNoRows = int64_t{1} << 40;  // where nothing is read

  // `visit(name, tensor)` for every tensor argument, absent ones too, in the schema's order.
  template <typename Visit>
  void visit_tensors(const Visit& visit) {
    visit("input", input);
    visit("weight_ih", weight_ih_);
    visit("weight_hh", weight_hh_);
    visit("bias_ih", bias_ih_);
    visit("bias_hh", bias_hh_);
    visit("weight_hr", weight_hr_);
    visit("initial_hidden", initial_hidden_);
    visit("initial_cell", initial_cell_);
    visit("lengths", lengths_);
    visit("reset", reset_);
    visit("seed", seed_);
    for (int site = 0; site < 3; ++site) {
      visit(kNormNames[site].weight, norms_[site].weight);
      visit(kNormNames[site].bias, norms_[site].bias);
    }
    visit("hidden_probe", hidden_probe_);
    visit("cell_probe", cell_probe_);
    visit("running_index", running_index_);
    visit("running_input_index", running_input_index_);
    for (int site = 0; site < 3; ++site) {
      visit(kNormNames[site].running_mean, norms_[site].running_mean);
      visit(kNormNames[site].running_var, norms_[site].running_var);
    }
    if (!saved_) return;
    visit("cells", saved_->cells);
    visit("hidden", saved_->hidden);
    visit("gates", saved_->gates);
    visit("input_gates", saved_->input_gates);
    visit("input_statistics", saved_->input_statistics);
    visit("recurrent_statistics", saved_->recurrent_statistics);
    visit("cell_statistics", saved_->cell_statistics);
  }

  void read_options() {
    check_option_counts(name_, rates_, options_);
    if (!(norm_eps_ >= 0.0) || std::isinf(norm_eps_)) fail(name_, ": norm_eps: expected >= 0, got ", norm_eps_);
    rates = decode_rates(name_, rates_);
    options = decode_options(name_, options_);
  }

  void read_shapes() {
    expect = {name_, place_ != Place::Cuda, input.get_device_index()};
    const Shape input_shape = shape_of(input);
    if (input_shape.size() != kRank || input_shape[0] == 0) {
      fail(name_, ": input: expected shape (T, B, I) with T >= 1, got ", text(input_shape),
           "; of several models (M, T, B, I)");
    }
    const Shape weight_shape = shape_of(weight_hh_);
    if (weight_shape.size() != 2 || weight_shape[1] == 0 || (weight_hr_ && weight_shape[0] < 4)) {
      fail(name_, ": weight_hh: expected shape ", weight_hr_ ? "(4H, P) with H and P >= 1" : "(4H, H) with H >= 1",
           ", got ", text(weight_shape));
    }
    const ScalarType type = input.scalar_type();
    if (type != ScalarType::Float && type != ScalarType::Double && type != ScalarType::BFloat16 &&
        type != ScalarType::Half) {
      fail(name_, ": input: expected dtype float32, float64, bfloat16 or float16, got ", text(type),
           "; convert it with .to()");
    }
    const ScalarType compute = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    const int64_t projected_size = weight_shape[1];
    const int64_t hidden_size = weight_hr_ ? weight_shape[0] / 4 : projected_size;
    shapes = {type, compute, input_shape[0], input_shape[1], input_shape[2], hidden_size, projected_size};
    // Row and step numbers are 32-bit words of the masks' counter; sizes are multiplied by 4 below.
    for (const int64_t size :
         {shapes.steps, shapes.rows, shapes.input_size, shapes.hidden_size, shapes.projected_size}) {
      if (size >= (int64_t{1} << 31) - 4) fail(name_, ": input: expected sizes below 2^31, got ", text(input_shape));
    }
  }

  bool site(int index) const {
    return index == 0 ? options.norm_input : index == 1 ? options.norm_recurrent : options.norm_cell;
  }
  int64_t width(int index) const { return (index == 2 ? 1 : 4) * shapes.hidden_size; }

  void check_norm_parameters() {
    for (int index = 0; index < 3; ++index) {
      NormTensors& norm = norms_[index];
      if (!site(index)) continue;
      const char* symbols = index == 2 ? "(H,)" : "(4H,)";
      const NormNames& names = kNormNames[index];
      if (!norm.weight) fail(name_, ": ", names.weight, ": expected a tensor, since this norm is on, got None");
      expect.check_contiguous(names.weight, norm.weight, shapes.storage, symbols, {width(index)});
      expect.check_contiguous(names.bias, norm.bias, shapes.storage, symbols, {width(index)});
    }
  }

  // An index is read from a tensor and used as a row number: on the host it is checked against the rows that there are,
  // on a device kernels clamp it to them. Without an index every step reads mean 0 and variance 1.
  void check_running_statistics() {
    const int64_t input_end = check_index("running_input_index", running_input_index_);
    const int64_t end = check_index("running_index", running_index_);
    for (int index = 0; index < 3; ++index) {
      if (!site(index)) continue;
      NormTensors& norm = norms_[index];
      const int64_t rows_read = index == 0 ? input_end : end;
      const bool expected =
          rows_read > 0 || (place_ != Place::Cpu && norm.running_mean.has_value() != norm.running_var.has_value());
      for (const bool mean : {true, false}) {
        OptionalTensor& tensor = mean ? norm.running_mean : norm.running_var;
        const char* const tensor_name = mean ? kNormNames[index].running_mean : kNormNames[index].running_var;
        if (!tensor) {
          if (expected) fail(name_, ": ", tensor_name, ": expected a tensor, since an index reads it, got None");
          continue;
        }
        const Shape shape = shape_of(*tensor);
        const int64_t rows = shape.empty() ? 0 : shape[0];
        expect.check_contiguous(tensor_name, *tensor, shapes.compute, index == 2 ? "(R, H)" : "(R, 4H)",
                                {rows, width(index)});
        if (rows_read > rows) {
          fail(name_, ": ", tensor_name, ": expected at least ", rows_read, " rows, which an index reads, got ", rows);
        }
        running_rows_[index] = std::min(running_rows_[index], rows);
      }
    }
  }

  // One past the largest row that the index reads, as far as that is known here; makes the index of an absent one.
  int64_t check_index(const char* index_name, OptionalTensor& index) {
    if (place_ != Place::Cpu) {
      expect.check_contiguous(index_name, index, ScalarType::Long, "(T,)", {shapes.steps});
      return 0;
    }
    if (!index) {
      index = empty(input, {shapes.steps}, ScalarType::Long);
      std::fill_n(static_cast<int64_t*>(index->mutable_data_ptr()), shapes.steps, int64_t{-1});
      return 0;
    }
    expect.check_contiguous(index_name, *index, ScalarType::Long, "(T,)", {shapes.steps});
    const auto* values = static_cast<const int64_t*>(pointer(*index));
    const auto [smallest, largest] = std::minmax_element(values, values + shapes.steps);
    if (*smallest < -1) fail(name_, ": ", index_name, ": expected row numbers or -1, got ", *smallest);
    return *largest + 1;
  }

  void* checked_saved(const char* tensor_name, Tensor& tensor, ScalarType type, const Shape& shape, bool wanted) {
    if (!wanted) return nullptr;
    const char* symbols = "the forward's";
    expect.check_contiguous(tensor_name, tensor, type, symbols, shape);
    return const_cast<void*>(pointer(tensor));  // the struct is the forward's; the backward writes none of it
  }

  LayerInputs pointers() const {
    LayerInputs in;
    in.dtype = shapes.storage == ScalarType::Double     ? fusedreg::ScalarType::Float64
               : shapes.storage == ScalarType::Float    ? fusedreg::ScalarType::Float32
               : shapes.storage == ScalarType::BFloat16 ? fusedreg::ScalarType::BFloat16
                                                        : fusedreg::ScalarType::Float16;
    in.steps = shapes.steps;
    in.rows = shapes.rows;
    in.input_size = shapes.input_size;
    in.hidden_size = shapes.hidden_size;
    in.projected_size = shapes.projected_size;
    in.rates = rates;
    in.options = options;
    in.norm_eps = norm_eps_;
    in.groups = groups_;
    in.grouped_seed = grouped_seed_;
    if (draws() && place_ == Place::Cpu) in.seeds = grouped_seed_ ? seed_values() : one_seed_;
    in.input = pointer(input);
    in.input_step_stride = input.stride(0);
    in.input_row_stride = input.stride(1);
    in.weight_ih = pointer(weight_ih_);
    in.weight_hh = pointer(weight_hh_);
    in.bias_ih = pointer(bias_ih_);
    in.bias_hh = pointer(bias_hh_);
    in.weight_hr = pointer(weight_hr_);
    in.initial_hidden = pointer(initial_hidden_);
    in.initial_cell = pointer(initial_cell_);
    in.lengths = static_cast<const int64_t*>(pointer(lengths_));
    in.reset = static_cast<const bool*>(pointer(reset_));
    const auto if_on = [this](int index, const OptionalTensor& tensor) {
      return options.norm != NormKind::None && site(index) ? pointer(tensor) : nullptr;
    };
    in.norm = {if_on(0, norms_[0].weight), if_on(0, norms_[0].bias),   if_on(1, norms_[1].weight),
               if_on(1, norms_[1].bias),   if_on(2, norms_[2].weight), if_on(2, norms_[2].bias)};
    if (options.norm == NormKind::Batch) {
      in.running.index = static_cast<const int64_t*>(pointer(running_index_));
      in.running.input_index = static_cast<const int64_t*>(pointer(running_input_index_));
      in.running.input_mean = if_on(0, norms_[0].running_mean);
      in.running.input_var = if_on(0, norms_[0].running_var);
      in.running.recurrent_mean = if_on(1, norms_[1].running_mean);
      in.running.recurrent_var = if_on(1, norms_[1].running_var);
      in.running.cell_mean = if_on(2, norms_[2].running_mean);
      in.running.cell_var = if_on(2, norms_[2].running_var);
    }
    return in;
  }

  bool draws() const {
    return options.training && std::any_of(rates_.begin(), rates_.end(), [](double rate) { return rate > 0.0; });
  }

  const int64_t* seed_values() const { return static_cast<const int64_t*>(pointer(*seed_)); }

  // One seed, or (S, 2) pairs of a seed and a first step. On a device kernels read them, from where seed_pointer()
  // says.
  void check_seed() {
    if (!seed_) fail(name_, ": seed: expected a 0-dimensional int64 tensor, since a rate is active, got None");
    const Shape shape = shape_of(*seed_);
    grouped_seed_ = shape.size() == 2;
    if (!grouped_seed_) {
      expect.check("seed", *seed_, ScalarType::Long, "()", {});
      if (place_ == Place::Cpu) one_seed_[0] = *seed_values();
      return;
    }
    expect.check_contiguous("seed", *seed_, ScalarType::Long, "(S, 2)", {shape[0], 2});
    groups_ = shape[0];
    check_groups("seed", groups_);
    for (int64_t group = 0; place_ == Place::Cpu && group < groups_; ++group) {
      const int64_t first_step = seed_values()[2 * group + 1];
      if (first_step >= 0 && first_step < kFirstFamily - shapes.steps) continue;
      fail(name_, ": seed: expected first steps of 0 to ", kFirstFamily - shapes.steps - 1, ", got ", first_step);
    }
  }

  // Below these words of the masks' counter there are steps, above them families that are drawn once a call.
  static constexpr int64_t kFirstFamily = 0xFFFFFFFB;

  const char* name_;
  Place place_ = Place::Cpu;
  Tensor weight_ih_, weight_hh_;
  OptionalTensor bias_ih_, bias_hh_, weight_hr_, initial_hidden_, initial_cell_, lengths_, reset_, seed_;
  NormTensors norms_[3];
  int64_t running_rows_[3] = {kNoRows, kNoRows, kNoRows};  // the fewest of each site's
  OptionalTensor hidden_probe_, cell_probe_, running_index_, running_input_index_;
  int64_t groups_ = 1;
  bool grouped_seed_ = false;
  int64_t one_seed_[2] = {0, 0};       // and the first step
  std::optional<SavedTensors> saved_;  // an empty Tensor costs an allocation, so the forward has none
  std::vector<double> rates_;
  std::vector<int64_t> options_;
  double norm_eps_ = 0;
};

}  // namespace fusedreg::stable
