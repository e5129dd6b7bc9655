// The forward of a layer: everything before the loop, and the loop by the chosen tier.
#include "input_norm.h"
#include "layer.h"
#include "layer_terms.h"
#include "persistent_forward.h"
#include "step_tier.h"

namespace fusedreg::cuda {
namespace {

class Forward {
 public:
  Forward(const ForwardParams& params, const Choice& choice, Scratch scratch)
      : in_(params.in),
        out_(params.out),
        choice_(choice),
        inputs_(in_, /*wanted=*/true, /*padding_counts=*/out_.input_gates != nullptr, /*most_groups=*/1, scratch) {
    const ScalarType compute = compute_type(in_.dtype);
    const int64_t gates = in_.steps * in_.rows * 4 * in_.hidden_size;
    const bool batch_norm = in_.options.norm == NormKind::Batch && in_.options.norm_input;
    const bool keeps_raw = out_.input_gates != nullptr;
    weight_ = scratch.take_if(drops_weight(in_), weight_elements(in_), in_.dtype);
    bias_ = scratch.take(4 * in_.hidden_size, compute);
    raw_ = keeps_raw ? out_.input_gates : scratch.take(gates, compute);
    // The norm works in place, unless the terms are kept as they were before it.
    terms_ = keeps_raw && in_.options.norm_input ? scratch.take(gates, compute) : raw_;
    counts_ = static_cast<int64_t*>(scratch.take_bytes(batch_norm ? (in_.steps + 1) * sizeof(int64_t) : 0));
    norm_scratch_ = scratch.take_bytes(in_.options.norm_input ? normalize_inputs_scratch(in_) : 0);
    loop_scratch_bytes_ =
        choice.tier == Tier::Step ? step_forward_scratch(in_, choice) : persistent_forward_scratch(in_, choice);
    loop_scratch_ = scratch.take_bytes(loop_scratch_bytes_);
    used_ = scratch.used();
  }

  size_t scratch_bytes() const { return used_; }

  void run(const DeviceArguments& device, const Caller& caller) {
    const void* weight = in_.weight_hh;
    if (weight_ != nullptr) {
      mask_weight(in_, caller.seed, weight_, caller.stream);
      weight = weight_;
    }
    multiply_terms(
        in_, in_.weight_ih, input_scale(in_), inputs_.copies(),
        [&](int gate) { return inputs_.of_gate(gate, 1, caller); }, raw_, caller);
    if (in_.options.norm_input) {
      if (in_.options.norm == NormKind::Batch) count_rows(in_, counts_, caller.stream);
      const InputNorm norm{in_, device.running_input_rows, counts_, raw_, out_.input_statistics};
      normalize_inputs(norm, terms_, norm_scratch_, caller.stream);
    }
    sum_biases(in_, bias_, caller.stream);

    ForwardLoop loop{};
    loop.layer = {in_, caller.seed, device.running_rows, weight, terms_, bias_};
    loop.out = out_;
    loop.scratch = loop_scratch_;
    loop.scratch_bytes = loop_scratch_bytes_;
    loop.stream = caller.stream;
    if (choice_.tier == Tier::Step) {
      step_forward(loop, choice_, caller.products);
    } else {
      persistent_forward(loop, choice_);
    }
  }

 private:
  const LayerInputs& in_;
  const LayerOutputs& out_;
  const Choice& choice_;
  MaskedInputs inputs_;
  void *weight_, *bias_, *raw_, *terms_, *norm_scratch_, *loop_scratch_;
  int64_t* counts_;
  size_t loop_scratch_bytes_, used_;
};

}  // namespace

size_t lstm_layer_forward_scratch(const ForwardParams& params, const Choice& choice) {
  return Forward(params, choice, Scratch(nullptr)).scratch_bytes();
}

void lstm_layer_forward(const ForwardParams& params, const DeviceArguments& device, const Choice& choice, void* scratch,
                        Products& products, void* stream) {
  Forward(params, choice, Scratch(scratch)).run(device, {device.seed, products, stream});
}

}  // namespace fusedreg::cuda
