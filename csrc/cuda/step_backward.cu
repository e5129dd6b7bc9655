// The step tier, backward: the loop over the steps, last step first.
#include "step_backward_batch_norm.cuh"
#include "step_backward_layer_norm.cuh"
#include "step_backward_plain.cuh"
#include "step_launch.h"

namespace fusedreg::cuda {
namespace {

template <class Compute>
void take_scratch(const LayerInputs& in, Scratch& scratch, StepBackward<Compute>& step) {
  const int64_t states = in.rows * in.hidden_size, hidden = in.rows * in.projected_size;
  const bool projects = in.weight_hr != nullptr;
  const auto take_if = [&](bool wanted, int64_t count) {
    return static_cast<Compute*>(scratch.take_if(wanted, count, compute_type(in.dtype)));
  };
  step.product = take_if(true, hidden * step.masks.hidden_copies());
  step.grad_cell = take_if(true, states);
  step.grad_hidden = take_if(step.masks.zones_hidden, hidden);
  step.kept = take_if(in.options.norm_cell, kKeptFields * states);
  step.recurrent_of_step = scratch.take_if(!steps_are_contiguous(in), 4 * states, in.dtype);
  step.projected_of_step = scratch.take_if(projects, parts_of(is_narrow(in.dtype)) * hidden, in.dtype);
  step.grad_unprojected = take_if(projects, parts_of(is_narrow(in.dtype)) * states);
}

// What reaches u W_hr^T, times W_hr.
template <class Compute>
void unproject(const StepBackward<Compute>& step, Products& products) {
  const LayerInputs& in = step.loop.layer.in;
  const int64_t B = in.rows, H = in.hidden_size, P = in.projected_size, parts = parts_of(is_narrow(in.dtype));
  products.multiply(Matrix::contiguous(step.grad_unprojected, compute_type(in.dtype), B, H).repeated(parts, B * H),
                    Matrix::contiguous(step.projected_of_step, in.dtype, B, P).repeated(parts, B * P),
                    Matrix::contiguous(in.weight_hr, in.dtype, P, H).repeated(parts, 0));
}

// da W_hh; with untied masks gate by gate, since each gate's share has its own mask, all four in one call.
template <class Compute>
void multiply(const StepBackward<Compute>& step, Products& products) {
  const LayerInputs& in = step.loop.layer.in;
  const int64_t B = in.rows, H = in.hidden_size, P = in.projected_size;
  const int64_t copies = step.masks.hidden_copies(), columns = 4 * H / copies;
  const char* grads = static_cast<const char*>(step.recurrent_of_step);
  if (grads == nullptr) {
    const int64_t first = position_of_step(in, step.s) * B * 4 * H;
    grads = static_cast<const char*>(step.loop.grad_recurrent) + first * static_cast<int64_t>(bytes_of(in.dtype));
  }
  products.multiply(Matrix::contiguous(step.product, compute_type(in.dtype), B, P).repeated(copies, B * P),
                    Matrix::by_rows(grads, in.dtype, B, columns, 4 * H).repeated(copies, columns),
                    Matrix::contiguous(step.loop.layer.weight_hh, in.dtype, columns, P).repeated(copies, columns * P));
}

template <class Storage>
void run(const BackwardLoop& loop, Products& products) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = loop.layer.in;
  StepBackward<Compute> step{};
  step.loop = loop;
  step.masks = loop_masks<Compute>(in);
  Scratch scratch(loop.scratch);
  take_scratch(in, scratch, step);
  const Launch how = step_launch<Compute>(in, loop.stream);
  for (step.s = in.steps - 1; step.s >= 0; --step.s) {
    if (step.projected_of_step != nullptr) {
      launch<step_backward_projected<Storage>>(units_launch(in, in.projected_size, loop.stream), step);
      unproject(step, products);
    }
    switch (in.options.norm) {
      case NormKind::None: launch<step_backward_plain<Storage>>(how, step); break;
      case NormKind::Layer: launch<step_backward_layer_norm<Storage>>(how, step); break;
      case NormKind::Batch: launch<step_backward_batch_norm<Storage>>(how, step); break;
    }
    if (step.s > 0 || loop.grad_initial_hidden != nullptr) multiply(step, products);
  }
  if (loop.grad_initial_hidden == nullptr && loop.grad_initial_cell == nullptr) return;
  launch<step_backward_end<Storage>>(units_launch(in, most_units(in), loop.stream), step);  // at step -1
}

}  // namespace

size_t step_backward_scratch(const LayerInputs& in, const Choice&) {
  Scratch measure(nullptr);
  StepBackward<float> step{};  // the sizes follow from in.dtype
  step.masks = loop_masks<float>(in);
  take_scratch(in, measure, step);
  return measure.used();
}

void step_backward(const BackwardLoop& loop, const Choice&, Products& products) {
  if (loop.layer.in.rows == 0) return;
  with_storage(loop.layer.in.dtype, [&](auto storage) { run<decltype(storage)>(loop, products); });
}

}  // namespace fusedreg::cuda
