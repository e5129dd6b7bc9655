// The step with layer normalisation, on the way back. As batch_norm_backward.h, but the means run over a row.
#pragma once

#include "gradient_context.h"
#include "layer_norm.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

// Through y = gain x_hat of one row of `groups` x hidden values: from dy (`grads`) to dx. `values` are the raw x, as a
// function of group and unit.
template <class Storage, class Values>
static void through_row_norm(const Plan<Storage>& plan, int groups, const RowMoments<ComputeOf<Storage>>& moments,
                             const ComputeOf<Storage>* gains, const ComputeOf<Storage>* grads, const Values& values,
                             ComputeOf<Storage>* results) {
  using Compute = ComputeOf<Storage>;
  using V = Vector<Compute>;
  constexpr int width = kWidth<Compute>;
  const Compute scale = moments.scale(plan.in.norm_eps), spread = moments.spread_scale(plan.in.norm_eps);
  V sum{}, products{};
  for (int group = 0; group < groups; ++group) {
    V part_of_sum{}, part_of_products{};
    for (int64_t unit = 0; unit < plan.padded_hidden; unit += width) {
      const int64_t at = group * plan.padded_hidden + unit;
      const V grad = load<Compute>(grads + at) * load<Compute>(gains + at);  // gains are 0 in the padding
      part_of_sum += grad;
      part_of_products += grad * ((values(group, unit) - moments.mean) * spread);
    }
    sum += part_of_sum;
    products += part_of_products;
  }
  const Compute inverse = Compute(1) / static_cast<Compute>(groups * plan.H);
  const Compute mean = sum_of_lanes<Compute>(sum) * inverse, slope = sum_of_lanes<Compute>(products) * inverse;
  for (int group = 0; group < groups; ++group) {
    for (int64_t unit = 0; unit < plan.padded_hidden; unit += width) {
      const int64_t at = group * plan.padded_hidden + unit;
      const V grad = load<Compute>(grads + at) * load<Compute>(gains + at);
      const V normalised = (values(group, unit) - moments.mean) * spread;
      store<Compute>(results + at, first_lanes<Compute>(scale * (grad - mean - normalised * slope),
                                                        static_cast<int>(smaller(width, plan.H - unit))));
    }
  }
}

template <class Storage>
static void layer_norm_step_backward(const BackwardContext<Storage>& context, const Share& share,
                                     const GradientRow<Storage>* rows, int64_t count) {
  using Compute = ComputeOf<Storage>;
  using V = Vector<Compute>;
  constexpr int width = kWidth<Compute>;
  const Plan<Storage>& plan = context.plan;
  const Options& options = plan.in.options;
  const LayerOutputs& saved = context.params.saved;
  const double eps = plan.in.norm_eps;
  const int64_t padded = plan.padded_hidden;
  CellTrace<Compute>* traces = reinterpret_cast<CellTrace<Compute>*>(context.room_of(share));
  for (int64_t i = 0; i < count; ++i) {
    const GradientRow<Storage>& row = rows[i];
    RowMoments<Compute> input, recurrent, cell;
    if (options.norm_input) input = load_row_moments<Compute>(saved.input_statistics, row.t, row.b, plan.B);
    if (options.norm_recurrent) recurrent = load_row_moments<Compute>(saved.recurrent_statistics, row.t, row.b, plan.B);
    if (options.norm_cell) cell = load_row_moments<Compute>(saved.cell_statistics, row.t, row.b, plan.B);
    const Compute input_spread = options.norm_input ? input.spread_scale(eps) : 1;
    const Compute recurrent_spread = options.norm_recurrent ? recurrent.spread_scale(eps) : 1;
    const Compute cell_scale = options.norm_cell ? cell.scale(eps) : 1;
    const Compute cell_spread = options.norm_cell ? cell.spread_scale(eps) : 1;

    // To the edge of N_c.
    V cell_sum{}, cell_products{};
    for (int64_t unit = 0; unit < padded; unit += width) {
      V z[4];
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t at = gate * padded + unit;
        z[gate] = (context.kept(row, gate, unit) - recurrent.mean) * recurrent_spread *
                      load<Compute>(context.norm.recurrent_gain + at) +
                  ((context.kept_input(row, gate, unit) - input.mean) * input_spread *
                       load<Compute>(context.norm.input_gain + at) +
                   load<Compute>(context.bias + at));
      }
      CellTrace<Compute> trace = context.enter_cell(row, unit, activated<Compute>(z));
      trace.normalised = (trace.candidate - cell.mean) * cell_spread;
      const V gain = load<Compute>(context.norm.cell_gain + unit);
      context.leave_output(row, unit, trace,
                           options.norm_cell ? trace.normalised * gain + load<Compute>(context.norm.cell_shift + unit)
                                             : trace.candidate);
      if (options.norm_cell) {
        const V products = trace.grad_normalised * trace.normalised;
        store<Compute>(row.cell_terms + unit, trace.grad_normalised);
        store<Compute>(row.cell_terms + padded + unit, products);
        // Kept as the rounded product: what is subtracted from it below is a mean of such products, and over a single
        // unit the two must cancel to exactly 0, which a product fused into the subtraction would not.
        trace.grad_normalised *= gain;
        cell_sum += trace.grad_normalised;
        cell_products += products * gain;
      }
      traces[unit / width] = trace;
    }

    // Through N_c and the cell to z.
    const Compute inverse = Compute(1) / static_cast<Compute>(plan.H);
    const Compute mean = sum_of_lanes<Compute>(cell_sum) * inverse;
    const Compute slope = sum_of_lanes<Compute>(cell_products) * inverse;
    for (int64_t unit = 0; unit < padded; unit += width) {
      const CellTrace<Compute>& trace = traces[unit / width];
      V through_norm = trace.grad_normalised;
      if (options.norm_cell) {
        through_norm = cell_scale * (trace.grad_normalised - mean - trace.normalised * slope);
      }
      context.leave_cell(row, unit, trace, through_norm);
    }

    // Through N_a and N_r.
    if (options.norm_recurrent) {
      through_row_norm(
          plan, 4, recurrent, context.norm.recurrent_gain, row.grad_gates,
          [&](int gate, int64_t unit) { return context.kept(row, gate, unit); }, row.grad_recurrent);
    }
    if (options.norm_input) {
      through_row_norm(
          plan, 4, input, context.norm.input_gain, row.grad_gates,
          [&](int gate, int64_t unit) { return context.kept_input(row, gate, unit); }, row.grad_input_gates);
    }
  }
}

// The gains' gradients sum over rows, which are several workers': after the loop, column by column, in a fixed order.
template <class Storage, class Pairs>
static void layer_norm_column_sums(const BackwardContext<Storage>& context, int64_t unit, const Pairs& pairs) {
  using Compute = ComputeOf<Storage>;
  using V = Vector<Compute>;
  const Plan<Storage>& plan = context.plan;
  const Options& options = plan.in.options;
  const LayerOutputs& saved = context.params.saved;
  V input[4] = {}, recurrent[4] = {}, cell_gain{}, cell_shift{};  // of this chunk
  pairs.for_each_place([&](int64_t pair, int64_t rank, int64_t s) {
    const int64_t t = plan.position(rank, s), b = plan.order[rank];
    const int64_t scratch = pair * plan.gate_stride, kept = (t * plan.B + b) * 4 * plan.H * kept_bytes<Storage>(true);
    GradientRow<Storage> row{};
    row.rebuilt_gates = context.rebuilt_gates == nullptr ? nullptr : context.rebuilt_gates + scratch;
    row.rebuilt_input_gates = context.rebuilt_input_gates == nullptr ? nullptr : context.rebuilt_input_gates + scratch;
    row.saved_gates = saved.gates == nullptr ? nullptr : static_cast<const char*>(saved.gates) + kept;
    row.saved_input_gates = saved.input_gates == nullptr ? nullptr : static_cast<const char*>(saved.input_gates) + kept;
    RowMoments<Compute> input_moments, recurrent_moments;
    if (options.norm_input) input_moments = load_row_moments<Compute>(saved.input_statistics, t, b, plan.B);
    if (options.norm_recurrent) recurrent_moments = load_row_moments<Compute>(saved.recurrent_statistics, t, b, plan.B);
    const Compute input_spread = input_moments.spread_scale(plan.in.norm_eps);
    const Compute recurrent_spread = recurrent_moments.spread_scale(plan.in.norm_eps);
    for (int gate = 0; gate < 4; ++gate) {
      const V grad = load<Compute>(context.grad_gates + scratch + gate * plan.padded_hidden + unit);
      if (options.norm_input) {
        input[gate] += grad * ((context.kept_input(row, gate, unit) - input_moments.mean) * input_spread);
      }
      if (options.norm_recurrent) {
        recurrent[gate] += grad * ((context.kept(row, gate, unit) - recurrent_moments.mean) * recurrent_spread);
      }
    }
    if (options.norm_cell) {
      const Compute* terms = context.cell_terms + pair * 2 * plan.padded_hidden;
      cell_shift += load<Compute>(terms + unit);
      cell_gain += load<Compute>(terms + plan.padded_hidden + unit);
    }
  });
  const auto add_to = [](Compute* total, V sum) { store<Compute>(total, load<Compute>(total) + sum); };
  const int64_t of_units = pairs.group * plan.padded_hidden + unit;
  add_to(context.gradient_cell_gain + of_units, cell_gain);
  add_to(context.gradient_cell_shift + of_units, cell_shift);
  for (int gate = 0; gate < 4; ++gate) {
    const int64_t of_gate = (pairs.group * 4 + gate) * plan.padded_hidden + unit;
    add_to(context.gradient_input_gain + of_gate, input[gate]);
    add_to(context.gradient_recurrent_gain + of_gate, recurrent[gate]);
  }
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
