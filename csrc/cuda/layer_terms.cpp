#include "layer_terms.h"

namespace fusedreg::cuda {
namespace {

// The rows (T * B) of the input as they lie, where one stride serves steps and rows alike; -1 where none does.
int64_t common_row_stride(const LayerInputs& in) {
  const int64_t stride = in.rows == 1 ? in.input_step_stride : in.input_row_stride;
  const bool regular = in.rows == 1 || in.steps == 1 || in.input_step_stride == in.rows * in.input_row_stride;
  return regular && stride >= in.input_size && stride > 0 ? stride : -1;
}

}  // namespace

MaskedInputs::MaskedInputs(const LayerInputs& in, bool wanted, bool padding_counts, int64_t most_groups,
                           Scratch& scratch)
    : in_(in),
      as_it_lies_(in.input_size == 0 ||
                  !(drops_inputs(in) || common_row_stride(in) < 0 || (padding_counts && in.lengths != nullptr))),
      copy_(scratch.take_if(wanted && in.input_size > 0 && (!as_it_lies_ || most_groups > 1),
                            in.steps * in.rows * in.input_size, in.dtype)) {}

Matrix MaskedInputs::of_gate(int gate, int64_t groups, const Caller& caller) {
  if (groups == 1 && as_it_lies_) {
    return Matrix::by_rows(in_.input, in_.dtype, in_.steps * in_.rows, in_.input_size, common_row_stride(in_));
  }
  const Held wanted{gate, groups};
  if (!(held_ == wanted)) gather_inputs(in_, caller.seed, gate, groups, copy_, caller.stream);
  held_ = wanted;
  return grouped_rows(in_, copy_, in_.input_size, groups);
}

PreviousHidden::PreviousHidden(const LayerInputs& in, bool wanted, Scratch& scratch)
    : in_(in), copy_(scratch.take_if(wanted, in.steps * in.rows * in.projected_size, in.dtype)) {}

Matrix PreviousHidden::of_gate(int gate, int64_t groups, const void* hidden, const Caller& caller) {
  const Held wanted{gate, groups};
  if (!(held_ == wanted)) gather_previous_hidden(in_, caller.seed, hidden, gate, groups, copy_, caller.stream);
  held_ = wanted;
  return grouped_rows(in_, copy_, in_.projected_size, groups);
}

}  // namespace fusedreg::cuda
