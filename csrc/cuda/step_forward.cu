// The step tier, forward: the loop over the steps.
#include "step_forward_batch_norm.cuh"
#include "step_forward_layer_norm.cuh"
#include "step_forward_plain.cuh"
#include "step_launch.h"

namespace fusedreg::cuda {
namespace {

template <class Compute>
void take_scratch(const LayerInputs& in, Scratch& scratch, StepForward<Compute>& step) {
  const int64_t states = in.rows * in.hidden_size, hidden = in.rows * in.projected_size;
  const ScalarType compute = compute_type(in.dtype);
  const bool cell = in.options.norm_cell, projects = in.weight_hr != nullptr;
  step.published = scratch.take(hidden * step.masks.hidden_copies(), in.dtype);
  step.recurrent = static_cast<const Compute*>(scratch.take(4 * states, compute));
  step.candidates = static_cast<Compute*>(scratch.take_if(cell, states, compute));
  step.output_gates = static_cast<Compute*>(scratch.take_if(cell, states, compute));
  step.unprojected = scratch.take_if(projects, parts_of(is_narrow(in.dtype)) * states, in.dtype);
  step.projected =
      static_cast<const Compute*>(scratch.take_if(projects, parts_of(is_narrow(in.dtype)) * hidden, compute));
}

// a = (m_h h) W_hh^T; with untied masks each gate from its own copy of h, all four in one call.
template <class Compute>
void multiply(const StepForward<Compute>& step, Products& products) {
  const LayerInputs& in = step.loop.layer.in;
  const int64_t B = in.rows, H = in.hidden_size, P = in.projected_size;
  const int64_t copies = step.masks.hidden_copies(), columns = 4 * H / copies;
  products.multiply(
      Matrix::by_rows(step.recurrent, compute_type(in.dtype), B, columns, 4 * H).repeated(copies, columns),
      Matrix::contiguous(step.published, in.dtype, B, P).repeated(copies, B * P),
      Matrix::contiguous(step.loop.layer.weight_hh, in.dtype, columns, P).transposed().repeated(copies, columns * P));
}

// u W_hr^T
template <class Compute>
void project(const StepForward<Compute>& step, Products& products) {
  const LayerInputs& in = step.loop.layer.in;
  const int64_t B = in.rows, H = in.hidden_size, P = in.projected_size, parts = parts_of(is_narrow(in.dtype));
  products.multiply(Matrix::contiguous(step.projected, compute_type(in.dtype), B, P).repeated(parts, B * P),
                    Matrix::contiguous(step.unprojected, in.dtype, B, H).repeated(parts, B * H),
                    Matrix::contiguous(in.weight_hr, in.dtype, P, H).transposed().repeated(parts, 0));
}

template <class Storage>
void run(const ForwardLoop& loop, Products& products) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = loop.layer.in;
  StepForward<Compute> step{};
  step.loop = loop;
  step.masks = loop_masks<Compute>(in);
  Scratch scratch(loop.scratch);
  take_scratch(in, scratch, step);
  step.kept_in_place = in.options.norm != NormKind::None && loop.out.gates != nullptr && steps_are_contiguous(in) &&
                       step.masks.recurrent_scale == 1;
  launch<step_forward_start<Storage>>(units_launch(in, most_units(in), loop.stream), step);
  const Launch how = step_launch<Compute>(in, loop.stream);
  for (step.s = 0; step.s < in.steps; ++step.s) {
    if (step.kept_in_place) {
      step.recurrent =
          static_cast<const Compute*>(loop.out.gates) + position_of_step(in, step.s) * in.rows * 4 * in.hidden_size;
    }
    multiply(step, products);
    switch (in.options.norm) {
      case NormKind::None: launch<step_forward_plain<Storage>>(how, step); break;
      case NormKind::Layer: launch<step_forward_layer_norm<Storage>>(how, step); break;
      case NormKind::Batch: launch<step_forward_batch_norm<Storage>>(how, step); break;
    }
    if (step.unprojected == nullptr) continue;
    project(step, products);
    launch<step_forward_projected<Storage>>(units_launch(in, in.projected_size, loop.stream), step);
  }
}

}  // namespace

size_t step_forward_scratch(const LayerInputs& in, const Choice&) {
  Scratch measure(nullptr);
  StepForward<float> step{};  // the sizes follow from in.dtype
  step.masks = loop_masks<float>(in);
  take_scratch(in, measure, step);
  return measure.used();
}

void step_forward(const ForwardLoop& loop, const Choice&, Products& products) {
  if (loop.layer.in.rows == 0) return;
  with_storage(loop.layer.in.dtype, [&](auto storage) { run<decltype(storage)>(loop, products); });
}

}  // namespace fusedreg::cuda
