// The step with recurrent batch normalisation, on the way back. For y = gain (x - mean) / deviation + shift over n
// rows:
//
//   dx = gain / deviation * (dy - mean(dy) - y_hat mean(dy y_hat)),   y_hat = (x - mean) / deviation
//
// and without the two means where the statistics were not the batch's own but constants. Only rows that run at the
// step take part.
#pragma once

#include "gradient_context.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

template <class Storage>
class BatchNormBackward {
  using Compute = ComputeOf<Storage>;
  using V = Vector<Compute>;
  using Context = BackwardContext<Storage>;
  static constexpr int width = kWidth<Compute>;

 public:
  BatchNormBackward(Context& context, const Share& share)
      : context_(context),
        plan_(context.plan),
        share_(share),
        traces_(reinterpret_cast<CellTrace<Compute>*>(context.room_of(share))) {}

  void step(int64_t s, const GradientRow<Storage>* rows, int64_t count) {
    for (int64_t unit = share_.first_unit; unit < share_.last_unit; unit += width) step_of_units(s, unit, rows, count);
  }

  // input_statistics="sequence": the input's share of the gradient waits for sums over the whole sequence.
  void finish_sequence(int64_t first_step, int64_t last_step) {
    if (!plan_.in.options.norm_input || !defers_input()) return;
    const int64_t pairs = plan_.first[last_step] - plan_.first[first_step];
    const bool of_batch = pairs >= 2;
    const Compute inverse = Compute(1) / static_cast<Compute>(pairs);
    for (int64_t unit = share_.first_unit; unit < share_.last_unit; unit += width) {
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t at = gate * plan_.padded_hidden + unit;
        const Moments<Compute> moments = load_moments<Compute>(context_.params.saved.input_statistics, 0, 4 * plan_.H,
                                                               gate * plan_.H + unit, units_at(unit), of_batch);
        const V scale = moments.scale(plan_.in.norm_eps);
        const V spread = moments.spread_scale(plan_.in.norm_eps);
        const V factor = scale * load<Compute>(context_.norm.input_gain + at);
        const V products = load<Compute>(context_.gradient_input_gain + at);
        V sum{};
        for (int64_t begin = 0; begin < pairs; begin += kSummedInARow) {
          const int64_t end = smaller(begin + kSummedInARow, pairs);
          V part{};
          for (int64_t pair = begin; pair < end; ++pair) {
            part += load<Compute>(context_.grad_gates + pair * plan_.gate_stride + at);
          }
          sum += part;
        }
        const V mean = of_batch ? sum * inverse : V{};
        const V slope = of_batch ? products * inverse : V{};
        for_each_pair(plan_, first_step, 0, pairs, [&](int64_t pair, int64_t rank, int64_t s) {
          const V normalised = (kept_input_at(pair, rank, s, gate, unit) - moments.mean) * spread;
          const V grad = load<Compute>(context_.grad_gates + pair * plan_.gate_stride + at);
          store<Compute>(context_.grad_input_gates + pair * plan_.gate_stride + at,
                         factor * (grad - mean - normalised * slope));
        });
      }
    }
  }

 private:
  int units_at(int64_t unit) const { return context_.units_at(unit); }
  bool defers_input() const { return plan_.batch_statistics && plan_.in.options.norm_input_sequence; }

  V kept_input_at(int64_t pair, int64_t rank, int64_t s, int gate, int64_t unit) const {
    if (context_.rebuilt_input_gates != nullptr) {
      return load<Compute>(context_.rebuilt_input_gates + pair * plan_.gate_stride + gate * plan_.padded_hidden + unit);
    }
    const int64_t row = plan_.position(rank, s) * plan_.B + plan_.order[rank];
    return kept_raw<Storage>(static_cast<const char*>(context_.params.saved.input_gates) +
                                 ((row * 4 + gate) * plan_.H + unit) * kept_bytes<Storage>(true),
                             units_at(unit));
  }

  static void add_to(Compute* sums, V value) { store<Compute>(sums, load<Compute>(sums) + value); }

  // One norm of one gate at one step.
  struct GateNorm {
    bool on = false;
    Moments<Compute> moments;
    V scale, spread, gain;
    V sum{}, products{};  // of dz, and of dz times the normalised value
    FUSEDREG_METHOD V normalised(V value) const { return (value - moments.mean) * spread; }
  };

  GateNorm gate_norm(bool on, const void* statistics, int64_t row, bool of_batch, const Compute* gains, int gate,
                     int64_t unit) const {
    GateNorm norm;
    norm.on = on;
    if (!on) return norm;
    norm.moments = load_moments<Compute>(statistics, row, 4 * plan_.H, gate * plan_.H + unit, units_at(unit), of_batch);
    norm.scale = norm.moments.scale(plan_.in.norm_eps);
    norm.spread = norm.moments.spread_scale(plan_.in.norm_eps);
    norm.gain = load<Compute>(gains + gate * plan_.padded_hidden + unit);
    return norm;
  }

  void step_of_units(int64_t s, int64_t unit, const GradientRow<Storage>* rows, int64_t count) {
    const Options& options = plan_.in.options;
    const LayerOutputs& saved = context_.params.saved;
    const bool of_batch = plan_.batch_statistics && count >= 2;
    GateNorm input[4], recurrent[4];
    for (int gate = 0; gate < 4; ++gate) {
      input[gate] = gate_norm(options.norm_input, saved.input_statistics, options.norm_input_sequence ? 0 : s, of_batch,
                              context_.norm.input_gain, gate, unit);
      recurrent[gate] = gate_norm(options.norm_recurrent, saved.recurrent_statistics, s, of_batch,
                                  context_.norm.recurrent_gain, gate, unit);
    }
    Moments<Compute> cell{V{}, broadcast<Compute>(1), false};
    V cell_scale = broadcast<Compute>(1), cell_spread = broadcast<Compute>(1), cell_gain = broadcast<Compute>(1),
      cell_shift{};
    if (options.norm_cell) {
      cell = load_moments<Compute>(saved.cell_statistics, s, plan_.H, unit, units_at(unit), of_batch);
      cell_scale = cell.scale(plan_.in.norm_eps);
      cell_spread = cell.spread_scale(plan_.in.norm_eps);
      cell_gain = load<Compute>(context_.norm.cell_gain + unit);
      cell_shift = load<Compute>(context_.norm.cell_shift + unit);
    }

    // To the edge of N_c.
    constexpr int64_t kAhead = 4;
    V cell_sum{}, cell_products{};
    for (int64_t i = 0; i < count; ++i) {
      const GradientRow<Storage>& row = rows[i];
      if (i + kAhead < count) context_.prefetch(rows[i + kAhead], unit);
      V z[4];
      for (int gate = 0; gate < 4; ++gate) {
        const V a = context_.kept(row, gate, unit), r = context_.kept_input(row, gate, unit);
        const int64_t at = gate * plan_.padded_hidden + unit;
        z[gate] =
            (recurrent[gate].on ? recurrent[gate].normalised(a) * recurrent[gate].gain : a) +
            ((input[gate].on ? input[gate].normalised(r) * input[gate].gain : r) + load<Compute>(context_.bias + at));
      }
      CellTrace<Compute> trace = context_.enter_cell(row, unit, activated<Compute>(z));
      trace.normalised = (trace.candidate - cell.mean) * cell_spread;
      context_.leave_output(row, unit, trace,
                            options.norm_cell ? trace.normalised * cell_gain + cell_shift : trace.candidate);
      cell_sum += trace.grad_normalised;
      cell_products += trace.grad_normalised * trace.normalised;
      traces_[i] = trace;
    }
    if (options.norm_cell && plan_.groups == 1) {
      add_to(context_.gradient_cell_shift + unit, cell_sum);
      add_to(context_.gradient_cell_gain + unit, cell_products);
    } else if (options.norm_cell) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = plan_.group_of(rows[i].b) * plan_.padded_hidden + unit;
        add_to(context_.gradient_cell_shift + at, traces_[i].grad_normalised);
        add_to(context_.gradient_cell_gain + at, traces_[i].grad_normalised * traces_[i].normalised);
      }
    }

    // Through N_c and the cell to z.
    const Compute inverse = Compute(1) / static_cast<Compute>(count);
    const V cell_mean = cell.of_batch ? cell_sum * inverse : V{};
    const V cell_slope = cell.of_batch ? cell_products * inverse : V{};
    for (int64_t i = 0; i < count; ++i) {
      const GradientRow<Storage>& row = rows[i];
      const CellTrace<Compute>& trace = traces_[i];
      const V through_norm = options.norm_cell ? cell_scale * cell_gain *
                                                     (trace.grad_normalised - cell_mean - trace.normalised * cell_slope)
                                               : trace.grad_normalised;
      const Gates<V> grad = context_.leave_cell(row, unit, trace, through_norm);
      const V grads[4] = {grad.i, grad.f, grad.g, grad.o};
      for (int gate = 0; gate < 4; ++gate) {
        if (input[gate].on) {
          input[gate].sum += grads[gate];
          input[gate].products += grads[gate] * input[gate].normalised(context_.kept_input(row, gate, unit));
        }
        if (recurrent[gate].on) {
          recurrent[gate].sum += grads[gate];
          recurrent[gate].products += grads[gate] * recurrent[gate].normalised(context_.kept(row, gate, unit));
        }
      }
    }

    // Through N_a and N_r.
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t at = gate * plan_.padded_hidden + unit;
      if (plan_.groups == 1) {
        if (input[gate].on) add_to(context_.gradient_input_gain + at, input[gate].products);
        if (recurrent[gate].on) add_to(context_.gradient_recurrent_gain + at, recurrent[gate].products);
      }
      for (int64_t i = 0; i < count; ++i) {
        const GradientRow<Storage>& row = rows[i];
        const V grad = load<Compute>(row.grad_gates + at);
        if (plan_.groups > 1) add_gains_of_row(input[gate], recurrent[gate], row, grad, gate, unit);
        if (recurrent[gate].on) {
          store<Compute>(row.grad_recurrent + at,
                         through(recurrent[gate], grad, context_.kept(row, gate, unit), inverse));
        }
        if (input[gate].on && !defers_input()) {
          store<Compute>(row.grad_input_gates + at,
                         through(input[gate], grad, context_.kept_input(row, gate, unit), inverse));
        }
      }
    }
  }

  // The gains' gradients where groups of rows have their own: statistics are constants then.
  void add_gains_of_row(const GateNorm& input, const GateNorm& recurrent, const GradientRow<Storage>& row, V grad,
                        int gate, int64_t unit) {
    const int64_t at = (plan_.group_of(row.b) * 4 + gate) * plan_.padded_hidden + unit;
    if (input.on) {
      add_to(context_.gradient_input_gain + at, grad * input.normalised(context_.kept_input(row, gate, unit)));
    }
    if (recurrent.on) {
      add_to(context_.gradient_recurrent_gain + at, grad * recurrent.normalised(context_.kept(row, gate, unit)));
    }
  }

  FUSEDREG_METHOD V through(const GateNorm& norm, V grad, V value, Compute inverse) const {
    const V factor = norm.scale * norm.gain;
    if (!norm.moments.of_batch) return factor * grad;
    return factor * (grad - norm.sum * inverse - norm.normalised(value) * (norm.products * inverse));
  }

  Context& context_;
  const Plan<Storage>& plan_;
  const Share& share_;
  CellTrace<Compute>* traces_;
};

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
