// The backward of a layer: what the loop reads, the loop by the chosen tier, and what follows from da and dz.
//
// dr is da where neither term is normalised, dz where the recurrent one alone is, and else N_r's way back from dz.
#include "input_norm.h"
#include "layer.h"
#include "layer_terms.h"
#include "masks.cuh"
#include "persistent_backward.h"
#include "step_tier.h"

namespace fusedreg::cuda {
namespace {

class Backward {
 public:
  Backward(const BackwardParams& params, const Choice& choice, Scratch scratch)
      : params_(params),
        in_(params.in),
        options_(params.in.options),
        choice_(choice),
        compute_(compute_type(in_.dtype)),
        rows_(in_.steps * in_.rows),
        width_(4 * in_.hidden_size),
        groups_(options_.gradient_groups > 1 ? options_.gradient_groups : 1),
        rebuilds_(options_.save == Save::Recompute),
        has_norm_(options_.norm != NormKind::None),
        normalises_terms_(options_.norm_input || options_.norm_recurrent),
        inputs_(in_, rebuilds_ || params.grad_weight_ih != nullptr, /*padding_counts=*/true, groups_, scratch),
        hidden_(in_, rebuilds_ || params.grad_weight_hh != nullptr, scratch) {
    const int64_t gates = rows_ * width_, states = rows_ * in_.hidden_size;
    const bool wants_input_terms = params.grad_input != nullptr || params.grad_weight_ih != nullptr;
    weight_ = scratch.take_if(drops_weight(in_), weight_elements(in_), in_.dtype);
    bias_ = scratch.take(width_, compute_);
    recurrent_ = rebuilds_ ? scratch.take(gates, compute_) : params.saved.gates;
    input_ = rebuilds_ ? scratch.take(gates, compute_) : params.saved.input_gates;
    terms_ = options_.norm_input ? scratch.take(gates, compute_) : input_;
    grad_recurrent_ = scratch.take(gates, in_.dtype);
    grad_gates_ = scratch.take_if(normalises_terms_, gates, compute_);
    const bool own_input_grad = options_.norm_input || (options_.norm_recurrent && is_narrow(in_.dtype));
    grad_input_terms_ = !normalises_terms_ ? grad_recurrent_
                        : own_input_grad   ? scratch.take_if(wants_input_terms, gates, in_.dtype)
                                           : grad_gates_;
    cell_normalised_ = scratch.take_if(options_.norm_cell, states, compute_);
    grad_cell_normalised_ = scratch.take_if(options_.norm_cell, states, compute_);
    counts_ = static_cast<int64_t*>(
        scratch.take_bytes(options_.norm == NormKind::Batch ? (in_.steps + 1) * sizeof(int64_t) : 0));
    totals_ = scratch.take_if(pooled(), 2 * width_, compute_);
    const ColumnSums widest = gate_sums(nullptr);
    sums_ = scratch.take_bytes(column_sums_scratch(widest));
    const int64_t longest_weight = in_.input_size > in_.projected_size ? in_.input_size : in_.projected_size;
    wide_weight_ = scratch.take_if(is_narrow(in_.dtype), groups_ * width_ * longest_weight, compute_);
    grouped_ = scratch.take_if(regroups(), gates, in_.dtype);
    grad_projected_ = scratch.take_if(params.grad_weight_hr != nullptr, rows_ * in_.projected_size, in_.dtype);
    unprojected_ = scratch.take_if(params.grad_weight_hr != nullptr, states, in_.dtype);
    const bool masks_input = params.grad_input != nullptr && drops_inputs(in_);
    product_ = scratch.take_if(masks_input, rows_ * in_.input_size, compute_);
    product_sum_ = scratch.take_if(masks_input && unties_inputs(in_), rows_ * in_.input_size, compute_);
    loop_scratch_bytes_ =
        choice.tier == Tier::Step ? step_backward_scratch(in_, choice) : persistent_backward_scratch(in_, choice);
    loop_scratch_ = scratch.take_bytes(loop_scratch_bytes_);
    used_ = scratch.used();
  }

  size_t scratch_bytes() const { return used_; }

  void run(void* second_grad_bias, const DeviceArguments& device, const Caller& caller) {
    prepare(device, caller);
    run_loop(device, caller);
    sum_gates(second_grad_bias, caller);
    sum_cells(caller);
    input_terms_gradient(device, caller);
    recurrent_weight_gradient(caller);
    input_weight_gradient(caller);
    projection_gradient(caller);
    input_gradient(caller);
  }

 private:
  // Pooled statistics pass gradients back through sums over the whole sequence.
  bool pooled() const { return options_.norm_input && options_.norm_input_sequence && options_.training; }

  // Rows of several groups lie in turn in each step.
  bool regroups() const { return groups_ > 1 && in_.steps > 1; }

  InputNorm input_norm(const DeviceArguments& device) const {
    return {in_, device.running_input_rows, counts_, input_, params_.saved.input_statistics};
  }

  void prepare(const DeviceArguments& device, const Caller& caller) {
    if (weight_ != nullptr) {
      mask_weight(in_, caller.seed, weight_, caller.stream);
    }
    if (counts_ != nullptr && options_.norm == NormKind::Batch) count_rows(in_, counts_, caller.stream);
    if (rebuilds_) {
      multiply_terms(
          in_, in_.weight_ih, input_scale(in_), inputs_.copies(),
          [&](int gate) { return inputs_.of_gate(gate, 1, caller); }, input_, caller);
      multiply_terms(
          in_, weight(), recurrent_scale(in_), hidden_.copies(),
          [&](int gate) { return hidden_.of_gate(gate, 1, params_.saved.hidden, caller); }, recurrent_, caller);
    }
    if (options_.norm_input) normalize_inputs_again(input_norm(device), terms_, caller.stream);
    sum_biases(in_, bias_, caller.stream);
  }

  void run_loop(const DeviceArguments& device, const Caller& caller) {
    BackwardLoop loop{};
    loop.layer = {in_, caller.seed, device.running_rows, weight(), terms_, bias_};
    loop.saved = params_.saved;
    loop.gates = recurrent_;
    loop.activated = !rebuilds_ && !has_norm_;
    loop.grad_output = params_.grad_output;
    loop.grad_output_step_stride = params_.grad_output_step_stride;
    loop.grad_output_row_stride = params_.grad_output_row_stride;
    loop.grad_final_hidden = params_.grad_final_hidden;
    loop.grad_final_cell = params_.grad_final_cell;
    loop.grad_cells = params_.grad_cells;
    loop.grad_recurrent = grad_recurrent_;
    loop.grad_gates = grad_gates_;
    loop.grad_cell_normalised = grad_cell_normalised_;
    loop.cell_normalised = cell_normalised_;
    loop.grad_initial_hidden = params_.grad_initial_hidden;
    loop.grad_initial_cell = params_.grad_initial_cell;
    loop.grad_hidden_probe = params_.grad_hidden_probe;
    loop.grad_cell_probe = params_.grad_cell_probe;
    loop.grad_projected = grad_projected_;
    loop.unprojected = unprojected_;
    loop.scratch = loop_scratch_;
    loop.scratch_bytes = loop_scratch_bytes_;
    loop.stream = caller.stream;
    if (choice_.tier == Tier::Step) {
      step_backward(loop, choice_, caller.products);
    } else {
      persistent_backward(loop, choice_);
    }
  }

  // Biases and shifts have one gradient, the sum of dz; a gain has the sum of dz times what it multiplies.
  ColumnSums gate_sums(void* second_grad_bias) const {
    ColumnSums sums;
    sums.in = in_;
    sums.counts = counts_;
    sums.columns = width_;
    sums.groups = groups_;
    sums.values = normalises_terms_ ? grad_gates_ : grad_recurrent_;
    sums.narrow = !normalises_terms_;
    void* const shifts[] = {params_.grad_bias, second_grad_bias, params_.grad_norm_input_bias,
                            params_.grad_norm_recurrent_bias};
    static_assert(sizeof(shifts) == sizeof(sums.results[0]));
    for (int copy = 0; copy < ColumnSums::kCopies; ++copy) sums.results[0][copy] = shifts[copy];
    if (params_.grad_norm_input_weight != nullptr || pooled()) {
      sums.factors[0] = {input_, params_.saved.input_statistics, /*input=*/true};
      sums.results[1][0] = params_.grad_norm_input_weight;
    }
    if (params_.grad_norm_recurrent_weight != nullptr) {
      sums.factors[1] = {recurrent_, params_.saved.recurrent_statistics, /*input=*/false};
      sums.results[2][0] = params_.grad_norm_recurrent_weight;
    }
    if (pooled()) {
      sums.totals[0] = totals_;
      sums.totals[1] = offset(totals_, width_, compute_);
    }
    return sums;
  }

  void sum_gates(void* second_grad_bias, const Caller& caller) const {
    const ColumnSums sums = gate_sums(second_grad_bias);
    bool wanted = pooled();
    for (const auto& results : sums.results) {
      for (const void* result : results) wanted = wanted || result != nullptr;
    }
    if (wanted) sum_columns(sums, sums_, caller.stream);
  }

  void sum_cells(const Caller& caller) const {
    if (params_.grad_norm_cell_weight == nullptr && params_.grad_norm_cell_bias == nullptr) return;
    ColumnSums sums;
    sums.in = in_;
    sums.columns = in_.hidden_size;
    sums.groups = groups_;
    sums.values = grad_cell_normalised_;
    sums.factors[0].values = cell_normalised_;
    sums.results[0][0] = params_.grad_norm_cell_bias;
    sums.results[1][0] = params_.grad_norm_cell_weight;
    sum_columns(sums, sums_, caller.stream);
  }

  void input_terms_gradient(const DeviceArguments& device, const Caller& caller) const {
    if (params_.grad_input == nullptr && params_.grad_weight_ih == nullptr) return;
    if (options_.norm_input) {
      input_norm_backward(input_norm(device), grad_gates_, totals_, grad_input_terms_, caller.stream);
    } else if (options_.norm_recurrent && is_narrow(in_.dtype)) {
      scale_elements(in_.dtype, grad_gates_, 1, rows_ * width_, grad_input_terms_, caller.stream);
    }
  }

  void recurrent_weight_gradient(const Caller& caller) {
    if (params_.grad_weight_hh == nullptr) return;
    weight_gradient(grad_recurrent_, in_.projected_size, hidden_.copies(), params_.grad_weight_hh, caller,
                    [&](int gate) { return hidden_.of_gate(gate, groups_, params_.saved.hidden, caller); });
    if (drops_weight(in_)) {
      const void* from = wide_weight_ != nullptr ? wide_weight_ : params_.grad_weight_hh;
      mask_weight_gradient(in_, caller.seed, from, recurrent_scale(in_), groups_, params_.grad_weight_hh,
                           caller.stream);
    } else {
      scale_weight(width_ * in_.projected_size, recurrent_scale(in_), params_.grad_weight_hh, caller);
    }
  }

  void input_weight_gradient(const Caller& caller) {
    if (params_.grad_weight_ih == nullptr || in_.input_size == 0) return;
    weight_gradient(grad_input_terms_, in_.input_size, inputs_.copies(), params_.grad_weight_ih, caller,
                    [&](int gate) { return inputs_.of_gate(gate, groups_, caller); });
    scale_weight(width_ * in_.input_size, input_scale(in_), params_.grad_weight_ih, caller);
  }

  // dW_hr = Σ dh̃ᵀ u
  void projection_gradient(const Caller& caller) {
    if (params_.grad_weight_hr == nullptr) return;
    const int64_t elements = in_.projected_size * in_.hidden_size;
    void* const to = wide_weight_ != nullptr ? wide_weight_ : params_.grad_weight_hr;
    caller.products.multiply(
        Matrix::contiguous(to, compute_, in_.projected_size, in_.hidden_size).repeated(groups_, elements),
        grouped_rows(in_, grad_projected_, in_.projected_size, groups_).transposed(),
        grouped_rows(in_, unprojected_, in_.hidden_size, groups_));
    scale_weight(elements, 1, params_.grad_weight_hr, caller);
  }

  // gradᵀ source, (4H, columns), gate by gate where there are four sources, and as often as there are groups. Sums over
  // all steps leave a library in float32 even beside 16-bit factors: it may split them into several, and round each.
  template <class SourceOf>
  void weight_gradient(const void* grad, int64_t columns, int copies, void* result, const Caller& caller,
                       const SourceOf& source_of) const {
    void* const to = wide_weight_ != nullptr ? wide_weight_ : result;
    if (regroups()) {
      group_rows(in_, grad, width_, groups_, grouped_, caller.stream);
      grad = grouped_;
    }
    const int64_t part = width_ / copies, rows = rows_ / groups_;
    for (int copy = 0; copy < copies; ++copy) {
      const Matrix left = Matrix::by_rows(offset(grad, copy * part, in_.dtype), in_.dtype, rows, part, width_)
                              .repeated(groups_, rows * width_);
      const Matrix product = Matrix::contiguous(offset(to, copy * part * columns, compute_), compute_, part, columns)
                                 .repeated(groups_, width_ * columns);
      caller.products.multiply(product, left.transposed(), source_of(copy));
    }
  }

  // `elements`: of one group.
  void scale_weight(int64_t elements, double scale, void* result, const Caller& caller) const {
    if (wide_weight_ == nullptr && scale == 1) return;
    const void* from = wide_weight_ != nullptr ? wide_weight_ : result;
    scale_elements(in_.dtype, from, scale, groups_ * elements, result, caller.stream);
  }

  // dx = Σ_k m_x^k ⊙ (dr^k W_ih^k)
  void input_gradient(const Caller& caller) const {
    if (params_.grad_input == nullptr || in_.input_size == 0) return;
    const int copies = inputs_.copies();
    const int64_t part = width_ / copies;
    for (int copy = 0; copy < copies; ++copy) {
      const Matrix grad =
          Matrix::by_rows(offset(grad_input_terms_, copy * part, in_.dtype), in_.dtype, rows_, part, width_);
      const Matrix weight = Matrix::contiguous(offset(in_.weight_ih, copy * part * in_.input_size, in_.dtype),
                                               in_.dtype, part, in_.input_size);
      if (product_ == nullptr) {
        caller.products.multiply(Matrix::contiguous(params_.grad_input, in_.dtype, rows_, in_.input_size), grad,
                                 weight);
        continue;
      }
      caller.products.multiply(Matrix::contiguous(product_, compute_, rows_, in_.input_size), grad, weight);
      mask_input_gradient(in_, caller.seed, copy, product_, product_sum_,
                          copy + 1 == copies ? params_.grad_input : nullptr, caller.stream);
    }
  }

  const void* weight() const { return weight_ != nullptr ? weight_ : in_.weight_hh; }

  const BackwardParams& params_;
  const LayerInputs& in_;
  const Options& options_;
  const Choice& choice_;
  ScalarType compute_;
  int64_t rows_, width_, groups_;
  bool rebuilds_, has_norm_, normalises_terms_;
  MaskedInputs inputs_;
  PreviousHidden hidden_;
  void *weight_, *bias_, *recurrent_, *input_, *terms_;
  void *grad_recurrent_, *grad_gates_, *grad_input_terms_;
  void *cell_normalised_, *grad_cell_normalised_;
  int64_t* counts_;
  void *grouped_, *grad_projected_, *unprojected_;
  void *totals_, *sums_, *wide_weight_, *product_, *product_sum_, *loop_scratch_;
  size_t loop_scratch_bytes_, used_;
};

}  // namespace

size_t lstm_layer_backward_scratch(const BackwardParams& params, const Choice& choice) {
  return Backward(params, choice, Scratch(nullptr)).scratch_bytes();
}

void lstm_layer_backward(const BackwardParams& params, void* second_grad_bias, const DeviceArguments& device,
                         const Choice& choice, void* scratch, Products& products, void* stream) {
  Backward(params, choice, Scratch(scratch)).run(second_grad_bias, device, {device.seed, products, stream});
}

}  // namespace fusedreg::cuda
