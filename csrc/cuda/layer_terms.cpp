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

MaskedInputs::MaskedInputs(const LayerInputs& in, bool wanted, bool padding_counts, Scratch& scratch)
    : in_(in),
      copy_(scratch.take_if(
          wanted && in.input_size > 0 &&
              (drops_inputs(in) || common_row_stride(in) < 0 || (padding_counts && in.lengths != nullptr)),
          in.steps * in.rows * in.input_size, in.dtype)) {}

Matrix MaskedInputs::of_gate(int gate, const Caller& caller) {
  const int64_t rows = in_.steps * in_.rows;
  if (copy_ == nullptr) return Matrix::by_rows(in_.input, in_.dtype, rows, in_.input_size, common_row_stride(in_));
  if (held_ != gate) gather_inputs(in_, caller.seed, gate, copy_, caller.stream);
  held_ = gate;
  return Matrix::contiguous(copy_, in_.dtype, rows, in_.input_size);
}

PreviousHidden::PreviousHidden(const LayerInputs& in, bool wanted, Scratch& scratch)
    : in_(in), copy_(scratch.take_if(wanted, in.steps * in.rows * in.hidden_size, in.dtype)) {}

Matrix PreviousHidden::of_gate(int gate, const void* hidden, const Caller& caller) {
  if (held_ != gate) gather_previous_hidden(in_, caller.seed, hidden, gate, copy_, caller.stream);
  held_ = gate;
  return Matrix::contiguous(copy_, in_.dtype, in_.steps * in_.rows, in_.hidden_size);
}

}  // namespace fusedreg::cuda
