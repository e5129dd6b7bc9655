// The step tier, backward: the loop over the steps, last step first.
#include "step_backward_batch_norm.cuh"
#include "step_backward_layer_norm.cuh"
#include "step_backward_plain.cuh"
#include "step_launch.h"

namespace fusedreg::cuda {
namespace {

template <class Compute>
void take_scratch(const LayerInputs& in, Scratch& scratch, StepBackward<Compute>& step) {
  const int64_t states = in.rows * in.hidden_size;
  const auto take_if = [&](bool wanted, int64_t count) {
    return static_cast<Compute*>(scratch.take_if(wanted, count, compute_type(in.dtype)));
  };
  step.product = take_if(true, states * step.masks.hidden_copies());
  step.grad_cell = take_if(true, states);
  step.grad_hidden = take_if(step.masks.zones_hidden, states);
  step.kept = take_if(in.options.norm_cell, kKeptFields * states);
  step.recurrent_of_step = scratch.take_if(!steps_are_contiguous(in), 4 * states, in.dtype);
}

// da W_hh; with untied masks gate by gate, since each gate's share has its own mask.
template <class Compute>
void multiply(const StepBackward<Compute>& step, Products& products) {
  const LayerInputs& in = step.loop.layer.in;
  const int64_t B = in.rows, H = in.hidden_size;
  const int64_t copies = step.masks.hidden_copies(), columns = 4 * H / copies;
  const int64_t storage = static_cast<int64_t>(bytes_of(in.dtype));
  const char* grads = static_cast<const char*>(step.recurrent_of_step);
  if (grads == nullptr) {
    const int64_t first = position_of_step(in, step.s) * B * 4 * H;
    grads = static_cast<const char*>(step.loop.grad_recurrent) + first * storage;
  }
  const char* weight = static_cast<const char*>(step.loop.layer.weight_hh);
  for (int64_t copy = 0; copy < copies; ++copy) {
    products.multiply(Matrix::contiguous(step.product + copy * B * H, compute_type(in.dtype), B, H),
                      Matrix::by_rows(grads + copy * columns * storage, in.dtype, B, columns, 4 * H),
                      Matrix::contiguous(weight + copy * columns * H * storage, in.dtype, columns, H));
  }
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
    switch (in.options.norm) {
      case NormKind::None: launch<step_backward_plain<Storage>>(how, step); break;
      case NormKind::Layer: launch<step_backward_layer_norm<Storage>>(how, step); break;
      case NormKind::Batch: launch<step_backward_batch_norm<Storage>>(how, step); break;
    }
    if (step.s > 0 || loop.grad_initial_hidden != nullptr) multiply(step, products);
  }
  if (loop.grad_initial_hidden == nullptr && loop.grad_initial_cell == nullptr) return;
  launch<step_backward_end<Storage>>(cells_launch(in, loop.stream), step);  // at step -1
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
