// The step with recurrent batch normalisation (Cooijmans et al. 2017), forward: a worker owns units of all rows, so
// a unit's statistics are its own.
//
//   z = N_a(a) + N_r(r) + b,  h_candidate = o tanh(N_c(candidate))
#pragma once

#include "context.h"
#include "moments.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

template <class Storage>
class BatchNormForward {
  using Compute = ComputeOf<Storage>;
  using V = Vector<Compute>;
  static constexpr int width = kWidth<Compute>;

 public:
  BatchNormForward(ForwardContext<Storage>& context, const Share& share)
      : context_(context), plan_(context.plan), share_(share), room_(context.room_of(share)) {}

  // input_statistics="sequence": one mean and variance over all (step, row) pairs; the chunk is the whole sequence.
  void take_sequence_statistics(int64_t pairs) {
    if (!plan_.batch_statistics || !plan_.in.options.norm_input || !plan_.in.options.norm_input_sequence) return;
    for (int64_t unit = share_.first_unit; unit < share_.last_unit; unit += width) {
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t at = gate * plan_.padded_hidden + unit;
        const Moments<Compute> moments =
            pairs >= 2 ? moments_of_columns<Compute>(context_.input_gates + at, plan_.gate_stride, pairs)
                       : population(plan_.in.running.input_mean, plan_.in.running.input_var,
                                    plan_.in.running.input_index, 0, gate, unit);
        store<Compute>(context_.sequence_moments + at, moments.mean);
        store<Compute>(context_.sequence_moments + 4 * plan_.padded_hidden + at, moments.variance);
        store_moments(context_.params.out.input_statistics, 0, 4 * plan_.H, gate * plan_.H + unit, units_at(unit),
                      moments);
      }
    }
  }

  void step(int64_t s, const StepRow<Storage>* rows, int64_t count) {
    for (int64_t unit = share_.first_unit; unit < share_.last_unit; unit += width) step_of_units(s, unit, rows, count);
  }

 private:
  int units_at(int64_t unit) const { return static_cast<int>(smaller(width, plan_.H - unit)); }

  Moments<Compute> population(const void* mean, const void* variance, const int64_t* indices, int64_t s, int gate,
                              int64_t unit) const {
    return population_moments<Compute>(mean, variance, indices, s, 4 * plan_.H, gate * plan_.H + unit, units_at(unit));
  }

  Moments<Compute> input_moments(int64_t s, int gate, int64_t unit, const StepRow<Storage>* rows, int64_t count) const {
    const RunningStatistics& running = plan_.in.running;
    const int64_t at = gate * plan_.padded_hidden + unit;
    if (plan_.batch_statistics && plan_.in.options.norm_input_sequence) {
      return {load<Compute>(context_.sequence_moments + at),
              load<Compute>(context_.sequence_moments + 4 * plan_.padded_hidden + at), true};
    }
    const Moments<Compute> moments =
        plan_.batch_statistics && count >= 2
            ? moments_of_columns<Compute>(rows[0].input_gates + at, plan_.gate_stride, count)
            : population(running.input_mean, running.input_var, running.input_index, s, gate, unit);
    const int64_t row = plan_.in.options.norm_input_sequence ? 0 : s;
    store_moments(context_.params.out.input_statistics, row, 4 * plan_.H, gate * plan_.H + unit, units_at(unit),
                  moments);
    return moments;
  }

  Moments<Compute> recurrent_moments(int64_t s, int gate, int64_t unit, const Compute* a, int64_t count) const {
    const RunningStatistics& running = plan_.in.running;
    const Moments<Compute> moments =
        plan_.batch_statistics && count >= 2
            ? moments_of_columns<Compute>(a + gate * width, 4 * width, count)
            : population(running.recurrent_mean, running.recurrent_var, running.index, s, gate, unit);
    store_moments(context_.params.out.recurrent_statistics, s, 4 * plan_.H, gate * plan_.H + unit, units_at(unit),
                  moments);
    return moments;
  }

  Moments<Compute> cell_moments(int64_t s, int64_t unit, const Compute* candidates, int64_t count) const {
    const RunningStatistics& running = plan_.in.running;
    const Moments<Compute> moments = plan_.batch_statistics && count >= 2
                                         ? moments_of_columns<Compute>(candidates, width, count)
                                         : population_moments<Compute>(running.cell_mean, running.cell_var,
                                                                       running.index, s, plan_.H, unit, units_at(unit));
    store_moments(context_.params.out.cell_statistics, s, plan_.H, unit, units_at(unit), moments);
    return moments;
  }

  void step_of_units(int64_t s, int64_t unit, const StepRow<Storage>* rows, int64_t count) {
    const Options& options = plan_.in.options;
    Compute* a = room_;                             // [row][gate][unit]
    Compute* candidates = a + plan_.B * 4 * width;  // [row][unit], and so the rest
    Compute* output_gates = candidates + plan_.B * width;
    Compute* previous_cells = output_gates + plan_.B * width;
    Compute* step_rows = previous_cells + plan_.B * width;  // [row][3][unit]: the masks that the second pass needs
    for_each_tile(count, [&](int64_t first, int tile_rows) {
      for (int m = 0; m < tile_rows; ++m) context_.prefetch(rows[first + m], unit);
      recurrent_tile(context_, share_, s, unit, unit + width, first, tile_rows, a + first * 4 * width, 4 * width,
                     width);
    });
    V input_mean[4], input_scale[4], recurrent_mean[4], recurrent_scale[4], bias[4];
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t at = gate * plan_.padded_hidden + unit;
      bias[gate] = load<Compute>(context_.bias + at);
      input_mean[gate] = recurrent_mean[gate] = V{};
      input_scale[gate] = recurrent_scale[gate] = broadcast<Compute>(1);
      if (options.norm_input) {
        const Moments<Compute> moments = input_moments(s, gate, unit, rows, count);
        input_mean[gate] = moments.mean;
        input_scale[gate] = moments.scale(plan_.in.norm_eps) * load<Compute>(context_.norm.input_gain + at);
      }
      if (options.norm_recurrent) {
        const Moments<Compute> moments = recurrent_moments(s, gate, unit, a, count);
        recurrent_mean[gate] = moments.mean;
        recurrent_scale[gate] = moments.scale(plan_.in.norm_eps) * load<Compute>(context_.norm.recurrent_gain + at);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const StepRow<Storage>& row = rows[i];
      V z[4];
      for (int gate = 0; gate < 4; ++gate) {
        const V r = load<Compute>(row.input_gates + gate * plan_.padded_hidden + unit);
        const V recurrent = load<Compute>(a + (i * 4 + gate) * width);
        context_.keep_pre_activations(row, gate, unit, recurrent, r);
        z[gate] = (recurrent - recurrent_mean[gate]) * recurrent_scale[gate] +
                  ((r - input_mean[gate]) * input_scale[gate] + bias[gate]);
      }
      const StepMasks<Compute> step = step_masks(plan_, context_.masks, row.rank, row.t, unit);
      V previous_cell, candidate;
      const Gates<V> gates = context_.begin_cell(row, unit, z, step, previous_cell, candidate);
      if (!options.norm_cell) {
        context_.finish_cell(row, unit, step, previous_cell, gates.o, candidate, candidate);
        continue;
      }
      store<Compute>(candidates + i * width, candidate);
      store<Compute>(output_gates + i * width, gates.o);
      store<Compute>(previous_cells + i * width, previous_cell);
      store<Compute>(step_rows + i * 3 * width, step.zone_hidden);
      store<Compute>(step_rows + (i * 3 + 1) * width, step.zone_cell);
      store<Compute>(step_rows + (i * 3 + 2) * width, step.output);
    }
    if (!options.norm_cell) return;
    const Moments<Compute> moments = cell_moments(s, unit, candidates, count);
    const V scale = moments.scale(plan_.in.norm_eps) * load<Compute>(context_.norm.cell_gain + unit);
    const V shift = load<Compute>(context_.norm.cell_shift + unit);
    for (int64_t i = 0; i < count; ++i) {
      StepMasks<Compute> step{};
      step.zone_hidden = load<Compute>(step_rows + i * 3 * width);
      step.zone_cell = load<Compute>(step_rows + (i * 3 + 1) * width);
      step.output = load<Compute>(step_rows + (i * 3 + 2) * width);
      const V candidate = load<Compute>(candidates + i * width);
      context_.finish_cell(rows[i], unit, step, load<Compute>(previous_cells + i * width),
                           load<Compute>(output_gates + i * width), candidate,
                           (candidate - moments.mean) * scale + shift);
    }
  }

  ForwardContext<Storage>& context_;
  const Plan<Storage>& plan_;
  const Share& share_;
  Compute* room_;
};

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
