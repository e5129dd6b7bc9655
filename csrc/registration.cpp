// The operators: their schemas, and their CPU implementations over LibTorch's stable ABI.
//
// Python has validated the arguments for its users (fusedreg/validation.py). What is checked again, in stable/*.h, is
// what memory safety needs, because anyone can call an operator: devices, types, sizes, layouts, and the one kind of
// index that is read from a tensor.

#include <pthread.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "common/params.h"
#include "cpu/lstm_layer.h"
#include "stable/layer_arguments.h"
#include "stable/team.h"
#include "stable/tensors.h"

// The 24 tensors that forward and backward share; the fakes of fusedreg/ops.py follow the same order.
#define FUSEDREG_LAYER_TENSORS                                                                                  \
  "Tensor input, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "                        \
  "Tensor? initial_hidden, Tensor? initial_cell, Tensor? lengths, Tensor? reset, Tensor? seed, "                \
  "Tensor? norm_input_weight, Tensor? norm_input_bias, Tensor? norm_recurrent_weight, "                         \
  "Tensor? norm_recurrent_bias, Tensor? norm_cell_weight, Tensor? norm_cell_bias, "                             \
  "Tensor? running_index, Tensor? running_input_index, Tensor? running_input_mean, Tensor? running_input_var, " \
  "Tensor? running_recurrent_mean, Tensor? running_recurrent_var, Tensor? running_cell_mean, "                  \
  "Tensor? running_cell_var, "

#define FUSEDREG_LAYER_OPTIONS "float[] rates, int[] options, float norm_eps"

namespace fusedreg {
namespace {

using stable::ArgumentReader;
using stable::LayerArguments;
using stable::OptionalTensor;
using stable::ScalarType;
using stable::Shape;
using stable::Tensor;

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
    "Tensor grad_bias_hh, Tensor grad_initial_hidden, Tensor grad_initial_cell, Tensor grad_norm_input_weight, "
    "Tensor grad_norm_input_bias, Tensor grad_norm_recurrent_weight, Tensor grad_norm_recurrent_bias, "
    "Tensor grad_norm_cell_weight, Tensor grad_norm_cell_bias)";

// An operator's results, in the schema's order. An absent one is an empty tensor of shape (0,), never a view of
// another.
class Results {
 public:
  explicit Results(const LayerArguments& layer) : layer_(layer) {}

  void* add(bool wanted, const Shape& shape, ScalarType type) {
    tensors_.push_back(stable::empty(layer_.input, wanted ? shape : Shape{0}, type));
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

// Set in the child of a fork. torch's OpenMP threads do not survive one, and libgomp then waits for them for ever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

int available_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// cpu::RunTeam over torch's own threads.
void run_team(int asked, cpu::TeamBody body, void* context) {
  if (asked <= 1) {
    body(context, 0, 1);
  } else if (forked.load(std::memory_order_relaxed)) {
    stable::run_team_of_new_threads(asked, body, context);
  } else {
    stable::Team team(asked, body, context);
    torch::stable::parallel_for(0, asked, 1, [&team](int64_t begin, int64_t end) { team.run_piece(begin, end); });
    team.rethrow();
  }
}

template <typename Kernel>
void run_kernel(const char* name, const Kernel& kernel) {
  try {
    kernel();
  } catch (const std::bad_alloc&) {
    stable::fail(name, ": out of memory for the workspace; use a smaller batch or a shorter sequence");
  }
}

void forward(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  constexpr const char* kName = "fusedreg::lstm_layer_forward";
  ArgumentReader reader(stack);
  LayerArguments layer(kName, reader, /*with_saved=*/false);
  ForwardParams params;
  params.in = layer.check(/*cpu=*/true);

  const Options& options = layer.options;
  const Rates& rates = layer.rates;
  const stable::LayerShapes& shapes = layer.shapes;
  const bool save = options.save != Save::Nothing;
  const bool save_gates = options.save == Save::Gates;
  const bool has_norm = options.norm != NormKind::None;
  // Otherwise the output is the carried h itself, and the backward is given the output.
  const bool output_differs = (options.training && (rates.output_dropout > 0 || rates.dropout > 0)) ||
                              (options.zoneout_candidate && rates.zoneout_hidden > 0);
  // A batch norm's are wanted in training whether or not there will be a backward: the buffers are updated from them.
  const bool statistics = has_norm && (save || (options.norm == NormKind::Batch && options.training));
  const int64_t width = 4 * shapes.hidden_size;

  Results results(layer);
  LayerOutputs& out = params.out;
  out.output = results.add(true, shapes.states(), shapes.storage);
  out.final_hidden = results.add(true, shapes.state(), shapes.storage);
  out.final_cell = results.add(true, shapes.state(), shapes.compute);
  out.cells = results.add(save || options.return_cells, shapes.states(), shapes.compute);
  out.hidden = results.add(save && output_differs, shapes.states(), shapes.storage);
  out.gates = results.add(save_gates, shapes.gates(), shapes.kept_gates(options));
  out.input_gates = results.add(save_gates && has_norm, shapes.gates(), shapes.compute);
  out.input_statistics =
      results.add(statistics && options.norm_input, shapes.statistics(options, true, width), shapes.compute);
  out.recurrent_statistics =
      results.add(statistics && options.norm_recurrent, shapes.statistics(options, false, width), shapes.compute);
  out.cell_statistics = results.add(statistics && options.norm_cell,
                                    shapes.statistics(options, false, shapes.hidden_size), shapes.compute);

  if (shapes.rows == 0) {
    results.zero();
  } else {
    run_kernel(kName, [&] { cpu::lstm_layer_forward(params, available_threads(), &run_team); });
  }
  results.give(stack);
}

// Which of the 13 results of the backward are wanted, in their order.
enum Gradient {
  kInput,
  kWeightIh,
  kWeightHh,
  kBiasIh,
  kBiasHh,
  kInitialHidden,
  kInitialCell,
  kNormInputWeight,
  kNormInputBias,
  kNormRecurrentWeight,
  kNormRecurrentBias,
  kNormCellWeight,
  kNormCellBias,
  kNumberOfGradients
};

void backward(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  constexpr const char* kName = "fusedreg::lstm_layer_backward";
  ArgumentReader reader(stack);
  OptionalTensor grad_output, grad_final_hidden, grad_final_cell, grad_cells;
  reader.take_into(grad_output, grad_final_hidden, grad_final_cell, grad_cells);
  LayerArguments layer(kName, reader, /*with_saved=*/true);
  const auto needed = reader.take<std::vector<bool>>();
  BackwardParams params;
  params.in = layer.check(/*cpu=*/true);
  params.saved = layer.check_saved();
  if (needed.size() != kNumberOfGradients) {
    stable::fail(kName, ": needed: expected ", int{kNumberOfGradients}, " flags, got ", needed.size());
  }

  const stable::LayerShapes& shapes = layer.shapes;
  const ScalarType storage = shapes.storage;
  if (grad_output) {
    layer.expect.check_strided("grad_output", *grad_output, storage, "(T, B, H)", shapes.states());
    params.grad_output = stable::pointer(grad_output);
    params.grad_output_step_stride = grad_output->stride(0);
    params.grad_output_row_stride = grad_output->stride(1);
  }
  layer.expect.check_contiguous("grad_final_hidden", grad_final_hidden, storage, "(B, H)", shapes.state());
  layer.expect.check_contiguous("grad_final_cell", grad_final_cell, shapes.compute, "(B, H)", shapes.state());
  layer.expect.check_contiguous("grad_cells", grad_cells, shapes.compute, "(T, B, H)", shapes.states());
  params.grad_final_hidden = stable::pointer(grad_final_hidden);
  params.grad_final_cell = stable::pointer(grad_final_cell);
  params.grad_cells = stable::pointer(grad_cells);

  const int64_t hidden_size = shapes.hidden_size;
  const Shape gates = {4 * hidden_size};
  const Shape units = {hidden_size};
  Results results(layer);
  params.grad_input = results.add(needed[kInput], {shapes.steps, shapes.rows, shapes.input_size}, storage);
  params.grad_weight_ih = results.add(needed[kWeightIh], {4 * hidden_size, shapes.input_size}, storage);
  params.grad_weight_hh = results.add(needed[kWeightHh], {4 * hidden_size, hidden_size}, storage);
  void* const grad_bias_ih = results.add(needed[kBiasIh], gates, storage);
  void* const grad_bias_hh = results.add(needed[kBiasHh], gates, storage);
  params.grad_bias = grad_bias_ih != nullptr ? grad_bias_ih : grad_bias_hh;
  params.grad_initial_hidden = results.add(needed[kInitialHidden], shapes.state(), storage);
  params.grad_initial_cell = results.add(needed[kInitialCell], shapes.state(), shapes.compute);
  // A norm that is off leaves its parameters' gradients to be zeroed here.
  const bool on = layer.options.norm != NormKind::None;
  const auto add_norm = [&](Gradient which, const Shape& shape, bool site) -> void* {
    void* const data = results.add(needed[which], shape, storage);
    if (on && site) return data;
    torch::stable::zero_(results[which]);
    return nullptr;
  };
  params.grad_norm_input_weight = add_norm(kNormInputWeight, gates, layer.options.norm_input);
  params.grad_norm_input_bias = add_norm(kNormInputBias, gates, layer.options.norm_input);
  params.grad_norm_recurrent_weight = add_norm(kNormRecurrentWeight, gates, layer.options.norm_recurrent);
  params.grad_norm_recurrent_bias = add_norm(kNormRecurrentBias, gates, layer.options.norm_recurrent);
  params.grad_norm_cell_weight = add_norm(kNormCellWeight, units, layer.options.norm_cell);
  params.grad_norm_cell_bias = add_norm(kNormCellBias, units, layer.options.norm_cell);

  if (shapes.rows == 0) {
    results.zero();
  } else {
    run_kernel(kName, [&] { cpu::lstm_layer_backward(params, available_threads(), &run_team); });
    if (grad_bias_ih != nullptr && grad_bias_hh != nullptr) {
      std::memcpy(grad_bias_hh, grad_bias_ih, gates[0] * results[kBiasIh].element_size());
    }
  }
  results.give(stack);
}

// What this file can use on this processor, best first: "avx512,avx2,portable".
void cpu_instruction_sets(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  stack[0] = torch::stable::detail::from(cpu::usable_instruction_sets());
}

void cpu_instruction_set(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  stack[0] = torch::stable::detail::from(cpu::get_instruction_set());
}

void set_cpu_instruction_set(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  const auto name = torch::stable::detail::to<std::string>(stack[0]);
  stack[0] = torch::stable::detail::from(cpu::set_instruction_set(name));
}

// The multiply-add rate in GFLOP/s of `threads` threads at once, each busy for `seconds`: the benchmarks' roof.
void measure_fma_rate(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  ArgumentReader reader(stack);
  const auto threads = reader.take<int64_t>();
  const auto seconds = reader.take<double>();
  if (threads < 1 || threads > available_threads() || !(seconds > 0.0 && seconds < 60.0)) {
    stable::fail("fusedreg::_measure_fma_rate: expected 1 to ", available_threads(),
                 " threads (torch.set_num_threads) and 0 to 60 seconds, got ", threads, " and ", seconds);
  }
  struct Measurement {
    double seconds;
    std::vector<double> rates;
  } measurement{seconds, std::vector<double>(threads)};
  run_team(
      static_cast<int>(threads),
      [](void* context, int worker, int /*workers*/) {
        auto& each = *static_cast<Measurement*>(context);
        each.rates[worker] = cpu::measure_fma_rate(each.seconds);
      },
      &measurement);
  double total = 0;
  for (const double rate : measurement.rates) total += rate;
  stack[0] = torch::stable::detail::from(total / 1e9);
}

// The version that this file was built from, for fusedreg/backends/cpu.py to compare with the Python files'.
void cpu_version(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  stack[0] = torch::stable::detail::from(std::string(FUSEDREG_VERSION));
}

}  // namespace
}  // namespace fusedreg

STABLE_TORCH_LIBRARY(fusedreg, library) {
  library.def(fusedreg::kForwardSchema);
  library.def(fusedreg::kBackwardSchema);
  library.def("_cpu_instruction_sets() -> str");
  library.def("_cpu_instruction_set() -> str");
  library.def("_set_cpu_instruction_set(str name) -> bool");
  library.def("_measure_fma_rate(int threads, float seconds) -> float");
  library.def("_cpu_version() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fusedreg, CPU, library) {
  library.impl("lstm_layer_forward", &fusedreg::forward);
  library.impl("lstm_layer_backward", &fusedreg::backward);
}

STABLE_TORCH_LIBRARY_IMPL(fusedreg, CompositeExplicitAutograd, library) {
  library.impl("_cpu_instruction_sets", &fusedreg::cpu_instruction_sets);
  library.impl("_cpu_instruction_set", &fusedreg::cpu_instruction_set);
  library.impl("_set_cpu_instruction_set", &fusedreg::set_cpu_instruction_set);
  library.impl("_measure_fma_rate", &fusedreg::measure_fma_rate);
  library.impl("_cpu_version", &fusedreg::cpu_version);
}
