// Runs the CPU kernels with teams of std::thread: equal bits for every size of team, alone and two calls at once.
//
// Stands alone, without torch and Python, so that ThreadSanitizer sees every thread and nothing that is not ours.
// tests/test_native.py runs it plainly, `make sanitize` under ThreadSanitizer. Exits with 0 when all is equal.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/lstm_layer.h"

namespace {

using namespace fusedreg;

// A worker of the kernels' own RunTeam: here a fresh std::thread each.
void run_team(int asked, cpu::TeamBody body, void* context) {
  std::vector<std::thread> others;
  for (int worker = 1; worker < asked; ++worker) others.emplace_back(body, context, worker, asked);
  body(context, 0, asked);
  for (std::thread& other : others) other.join();
}

struct Case {
  const char* name;
  int64_t steps, rows, input_size, hidden_size;
  ScalarType dtype = ScalarType::Float32;
  NormKind norm = NormKind::None;
  bool masks = false;
  bool ragged = false;
  bool reverse = false;
  Save save = Save::Gates;
  bool untied = false;
  int64_t projected_size = 0;  // 0: no projection

  int64_t outputs() const { return projected_size > 0 ? projected_size : hidden_size; }
};

int64_t size_of(ScalarType type) { return type == ScalarType::Float64 ? 8 : type == ScalarType::Float32 ? 4 : 2; }
ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Float64 ? ScalarType::Float64 : ScalarType::Float32;
}

// A tensor of any type, and its bytes for comparison.
class Buffer {
 public:
  Buffer(int64_t count, ScalarType type) : count_(count), type_(type), bytes_(count * size_of(type)) {}

  // Uniform in [middle - width, middle + width], from the name of nothing but a counter.
  Buffer& fill(uint64_t seed, double middle, double width) {
    uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
    for (int64_t i = 0; i < count_; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const double value = middle + width * (static_cast<double>(state >> 40) / (1 << 23) - 1);
      if (type_ == ScalarType::Float64) {
        std::memcpy(&bytes_[i * 8], &value, 8);
        continue;
      }
      const float narrow = static_cast<float>(value);
      uint32_t bits = 0;
      std::memcpy(&bits, &narrow, 4);
      if (type_ == ScalarType::Float32) {
        std::memcpy(&bytes_[i * 4], &bits, 4);
      } else {
        const uint16_t upper = static_cast<uint16_t>(bits >> 16);  // bfloat16, truncated
        std::memcpy(&bytes_[i * 2], &upper, 2);
      }
    }
    return *this;
  }
  // What is not written afterwards is found: 0xFF is NaN in every type.
  void poison() { std::memset(bytes_.data(), 0xFF, bytes_.size()); }
  void* data() { return bytes_.data(); }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

 private:
  int64_t count_;
  ScalarType type_;
  std::vector<unsigned char> bytes_;
};

// One layer's tensors, and its forward and backward run over them.
class Layer {
 public:
  explicit Layer(const Case& which) : case_(which), compute_(compute_type(which.dtype)) {
    const int64_t gates = 4 * case_.hidden_size;
    in_.dtype = case_.dtype;
    in_.steps = case_.steps;
    in_.rows = case_.rows;
    in_.input_size = case_.input_size;
    in_.hidden_size = case_.hidden_size;
    in_.projected_size = case_.outputs();
    in_.norm_eps = 1e-5;
    in_.seeds = seeds_;
    in_.options.training = true;
    in_.options.reverse = case_.reverse;
    in_.options.save = case_.save;
    in_.options.return_cells = true;
    in_.options.norm = case_.norm;
    in_.options.untied_masks = case_.untied;
    in_.options.zoneout_candidate = case_.untied;
    if (case_.masks) in_.rates = {0.2, 0.3, 0.25, 0.15, 0.2, 0.1, 0.3, 0.15, 0.4};
    in_.input = given(case_.steps * case_.rows * case_.input_size, case_.dtype, 0, 1);
    in_.input_step_stride = case_.rows * case_.input_size;
    in_.input_row_stride = case_.input_size;
    in_.weight_ih = given(gates * case_.input_size, case_.dtype, 0, 0.2);
    in_.weight_hh = given(gates * case_.outputs(), case_.dtype, 0, 0.2);
    if (case_.projected_size > 0) {
      in_.weight_hr = given(case_.projected_size * case_.hidden_size, case_.dtype, 0, 0.2);
    }
    in_.bias_ih = given(gates, case_.dtype, 0, 0.2);
    in_.bias_hh = given(gates, case_.dtype, 0, 0.2);
    in_.initial_hidden = given(case_.rows * case_.outputs(), case_.dtype, 0, 0.5);
    in_.initial_cell = given(case_.rows * case_.hidden_size, compute_, 0, 0.5);
    if (case_.ragged) {
      for (int64_t row = 0; row < case_.rows; ++row) lengths_.push_back((row * 5 + 3) % (case_.steps + 1));
      lengths_[0] = case_.steps;
      in_.lengths = lengths_.data();
    }
    if (case_.norm != NormKind::None) {
      in_.options.norm_input = in_.options.norm_recurrent = in_.options.norm_cell = true;
      in_.norm.input_weight = given(gates, case_.dtype, 0.5, 0.2);
      in_.norm.recurrent_weight = given(gates, case_.dtype, 0.5, 0.2);
      in_.norm.cell_weight = given(case_.hidden_size, case_.dtype, 0.5, 0.2);
      in_.norm.cell_bias = given(case_.hidden_size, case_.dtype, 0, 0.2);
    }
    if (case_.norm == NormKind::Layer) {
      in_.norm.input_bias = given(gates, case_.dtype, 0, 0.2);
      in_.norm.recurrent_bias = given(gates, case_.dtype, 0, 0.2);
    }
    if (case_.norm == NormKind::Batch) {
      index_.assign(case_.steps, -1);
      in_.running.index = in_.running.input_index = index_.data();
    }
  }

  // Everything that the forward and the backward write, one after the other.
  std::vector<unsigned char> run(int threads) {
    const int64_t gates = 4 * case_.hidden_size, cells = case_.rows * case_.hidden_size;
    const int64_t hiddens = case_.rows * case_.outputs();
    const bool has_norm = case_.norm != NormKind::None;
    const bool layer_norm = case_.norm == NormKind::Layer;
    std::vector<Buffer> results;
    results.reserve(40);
    const auto result = [&results](bool wanted, int64_t count, ScalarType type) -> void* {
      if (!wanted) return nullptr;
      results.emplace_back(count, type).poison();
      return results.back().data();
    };

    ForwardParams forward;
    forward.in = in_;
    LayerOutputs& out = forward.out;
    out.output = result(true, case_.steps * hiddens, case_.dtype);
    out.final_hidden = result(true, hiddens, case_.dtype);
    out.final_cell = result(true, cells, compute_);
    out.cells = result(true, case_.steps * cells, compute_);
    out.hidden = result(case_.masks, case_.steps * hiddens, case_.dtype);
    const bool save_gates = case_.save == Save::Gates;
    out.gates = result(save_gates, case_.steps * case_.rows * gates, case_.dtype);
    out.input_gates = result(save_gates && has_norm, case_.steps * case_.rows * gates, case_.dtype);
    const auto statistics = [&](int64_t width) { return case_.steps * 2 * (layer_norm ? case_.rows : width); };
    out.input_statistics = result(has_norm, statistics(gates), compute_);
    out.recurrent_statistics = result(has_norm, statistics(gates), compute_);
    out.cell_statistics = result(has_norm, statistics(case_.hidden_size), compute_);
    cpu::lstm_layer_forward(forward, threads, &run_team);

    BackwardParams backward;
    backward.in = in_;
    backward.saved = out;
    if (backward.saved.hidden == nullptr) backward.saved.hidden = out.output;
    backward.grad_output = grad_output_.data();
    backward.grad_output_step_stride = hiddens;
    backward.grad_output_row_stride = case_.outputs();
    backward.grad_final_hidden = grad_final_hidden_.data();
    backward.grad_final_cell = grad_final_cell_.data();
    backward.grad_cells = grad_cells_.data();
    backward.grad_input = result(true, case_.steps * case_.rows * case_.input_size, case_.dtype);
    backward.grad_weight_ih = result(true, gates * case_.input_size, case_.dtype);
    backward.grad_weight_hh = result(true, gates * case_.outputs(), case_.dtype);
    backward.grad_weight_hr = result(case_.projected_size > 0, case_.projected_size * case_.hidden_size, case_.dtype);
    backward.grad_bias = result(true, gates, case_.dtype);
    backward.grad_initial_hidden = result(true, hiddens, case_.dtype);
    backward.grad_initial_cell = result(true, cells, compute_);
    backward.grad_hidden_probe = result(true, case_.steps * hiddens, case_.dtype);
    backward.grad_cell_probe = result(true, case_.steps * cells, compute_);
    backward.grad_norm_input_weight = result(has_norm, gates, case_.dtype);
    backward.grad_norm_input_bias = result(layer_norm, gates, case_.dtype);
    backward.grad_norm_recurrent_weight = result(has_norm, gates, case_.dtype);
    backward.grad_norm_recurrent_bias = result(layer_norm, gates, case_.dtype);
    backward.grad_norm_cell_weight = result(has_norm, case_.hidden_size, case_.dtype);
    backward.grad_norm_cell_bias = result(has_norm, case_.hidden_size, case_.dtype);
    cpu::lstm_layer_backward(backward, threads, &run_team);

    std::vector<unsigned char> all;
    for (const Buffer& each : results) all.insert(all.end(), each.bytes().begin(), each.bytes().end());
    return all;
  }

 private:
  const void* given(int64_t count, ScalarType type, double middle, double width) {
    inputs_.push_back(std::vector<Buffer>{Buffer(count, type).fill(inputs_.size() + 1, middle, width)});
    return inputs_.back()[0].data();
  }

  const Case case_;
  const ScalarType compute_;
  LayerInputs in_;
  std::vector<std::vector<Buffer>> inputs_;  // a buffer's bytes stay where they are when the outer vector grows
  std::vector<int64_t> lengths_, index_;
  const int64_t seeds_[2] = {42, 0};
  Buffer grad_output_ = Buffer(case_.steps * case_.rows * case_.outputs(), case_.dtype).fill(101, 0, 1);
  Buffer grad_final_hidden_ = Buffer(case_.rows * case_.outputs(), case_.dtype).fill(102, 0, 1);
  Buffer grad_final_cell_ = Buffer(case_.rows * case_.hidden_size, compute_).fill(103, 0, 1);
  Buffer grad_cells_ = Buffer(case_.steps * case_.rows * case_.hidden_size, compute_).fill(104, 0, 1);
};

constexpr Case kCases[] = {
    {"plain", 7, 5, 6, 9},
    {"one row", 9, 1, 20, 40},
    {"one unit", 3, 4, 2, 1},
    {"wide", 4, 33, 70, 130},
    {"masks, ragged", 8, 13, 10, 21, ScalarType::Float32, NormKind::None, true, true},
    {"masks, untied, reverse", 8, 13, 10, 21, ScalarType::Float32, NormKind::None, true, true, true, Save::Gates, true},
    {"recompute", 8, 13, 10, 21, ScalarType::Float32, NormKind::None, true, true, false, Save::Recompute},
    {"batch norm", 6, 9, 10, 35, ScalarType::Float32, NormKind::Batch, true, true},
    {"batch norm, recompute", 6, 9, 10, 35, ScalarType::Float32, NormKind::Batch, false, true, true, Save::Recompute},
    {"layer norm", 6, 9, 10, 35, ScalarType::Float32, NormKind::Layer, true, true},
    {"float64", 6, 9, 10, 35, ScalarType::Float64, NormKind::Batch, true, true},
    {"bfloat16", 6, 9, 10, 35, ScalarType::BFloat16, NormKind::None, true, true},
    {"projection by units", 8, 5, 20, 90, ScalarType::Float32, NormKind::None, true, true, true, Save::Gates, true, 37},
    {"projection by rows", 6, 40, 20, 35, ScalarType::Float32, NormKind::Layer, true, true, false, Save::Gates, false,
     9},
};
constexpr int kLargestTeam = 5;

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && !cpu::set_instruction_set(arguments[1])) {
    std::fprintf(stderr, "instruction set %s: not run, this processor or build lacks it\n", arguments[1]);
    return 77;
  }
  int failures = 0, checks = 0;
  for (const Case& which : kCases) {
    Layer layer(which);
    const std::vector<unsigned char> expected = layer.run(1);
    for (int threads = 1; threads <= kLargestTeam; ++threads) {
      // Two callers at once: what the kernels pool between calls is shared by them.
      std::vector<unsigned char> first, second;
      std::thread other([&] { second = layer.run(threads); });
      first = layer.run(threads);
      other.join();
      checks += 2;
      const int unequal = (first != expected) + (second != expected);
      if (unequal > 0) std::fprintf(stderr, "%s: %d threads give other bits than one\n", which.name, threads);
      failures += unequal;
    }
  }
  std::printf("%s: %d passed, %d failed\n", cpu::get_instruction_set().c_str(), checks - failures, failures);
  return failures == 0 ? 0 : 1;
}
