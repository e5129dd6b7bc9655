// What follows the backward loop: the weights' gradients as one product over the steps, the inputs' likewise, column
// sums for biases and gains. Each element is one worker's from the first addition to the last, in an order that does
// not depend on who the worker is.
#pragma once

#include "gradient_context.h"
#include "layer_norm_backward.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

template <class Storage>
class AfterLoop {
  using Compute = ComputeOf<Storage>;
  using V = Vector<Compute>;
  using Context = BackwardContext<Storage>;
  static constexpr int width = kWidth<Compute>;
  static constexpr int panel_width = width * kTileVectors;

 public:
  static void run_chunk(Context& context, const Share& share, int64_t first_step, int64_t last_step, bool is_first) {
    const Plan<Storage>& plan = context.plan;
    const int64_t pairs = plan.first[last_step] - plan.first[first_step];
    int64_t first, last;
    split(pairs, kTileRows, share.worker, share.workers, first, last);
    if (context.wants_weight_ih || context.wants_weight_hh || context.wants_weight_hr) {
      if (!context.rebuilds) {
        if (context.wants_weight_ih) gather_inputs(plan, context.masks.input, first_step, first, last, context.inputs);
        if (context.wants_weight_hh) {
          gather_hidden(plan, static_cast<const Storage*>(context.params.saved.hidden), context.masks.hidden,
                        first_step, first, last, context.hidden_rows);
        }
        context.barrier.wait(share.workers);
      }
      for_each_group(plan, first_step, last_step,
                     [&](const auto& of_group) { pack_all_panels(context, share, of_group); });
      context.barrier.wait(share.workers);
      for_each_group(plan, first_step, last_step,
                     [&](const auto& of_group) { weight_gradients(context, share, of_group, !is_first); });
    }
    if (context.wants_input) input_gradient(context, share, first_step, first, last);
    for_each_group(plan, first_step, last_step, [&](const auto& of_group) { column_sums(context, share, of_group); });
  }

  static void write_results(Context& context, const Share& share, bool no_steps) {
    const Plan<Storage>& plan = context.plan;
    const BackwardParams& params = context.params;
    if (context.wants_weight_ih) {
      write_weight(context, share, context.gradient_ih, plan.H, plan.I, false, no_steps, params.grad_weight_ih);
    }
    if (context.wants_weight_hh) {
      write_weight(context, share, context.gradient_hh, plan.H, plan.P, plan.weight_dropout.drawn, no_steps,
                   params.grad_weight_hh);
    }
    if (context.wants_weight_hr) {
      write_weight(context, share, context.gradient_hr, plan.P, plan.H, false, no_steps, params.grad_weight_hr);
    }
    for (int64_t rank = share.worker; rank < plan.B; rank += share.workers) write_states(context, rank);
    context.barrier.wait(share.workers);
    if (share.worker != 0) return;
    write_columns(context, context.gradient_bias, 4, params.grad_bias);
    if (!plan.has_norm) return;
    write_columns(context, context.gradient_input_gain, 4, params.grad_norm_input_weight);
    write_columns(context, context.gradient_bias, 4, params.grad_norm_input_bias);
    write_columns(context, context.gradient_recurrent_gain, 4, params.grad_norm_recurrent_weight);
    write_columns(context, context.gradient_bias, 4, params.grad_norm_recurrent_bias);
    write_columns(context, context.gradient_cell_gain, 1, params.grad_norm_cell_weight);
    write_columns(context, context.gradient_cell_shift, 1, params.grad_norm_cell_bias);
  }

 private:
  template <class Pairs>
  static void pack_all_panels(Context& context, const Share& share, const Pairs& pairs) {
    const Plan<Storage>& plan = context.plan;
    if (context.wants_weight_ih) {
      pack_copies(share, context.inputs, plan.input_stride, context.input_copies(), pairs, plan.padded_input,
                  context.input_panels);
    }
    if (context.wants_weight_hh) {
      pack_copies(share, context.hidden_rows, plan.projected_stride, context.hidden_copies(), pairs,
                  plan.padded_projected, context.hidden_panels);
    }
    if (context.wants_weight_hr) {
      pack_copies(share, context.unprojected, plan.hidden_stride, 1, pairs, plan.padded_hidden,
                  context.unprojected_panels);
    }
  }

  template <class Pairs>
  static void pack_copies(const Share& share, const Compute* rows, int64_t stride, int copies, const Pairs& pairs,
                          int64_t padded_columns, Compute* panels) {
    const int64_t count = (padded_columns + panel_width - 1) / panel_width;
    panels += pairs.before * copies * count * panel_width;
    int64_t first, last;
    split(count, 1, share.worker, share.workers, first, last);
    for (int copy = 0; copy < copies; ++copy) {
      pack_pair_panels<Compute>(rows + copy * stride, copies * stride, pairs, padded_columns, first, last,
                                panels + copy * count * pairs.count * panel_width);
    }
  }

  template <class Pairs>
  static void weight_gradients(const Context& context, const Share& share, const Pairs& pairs, bool accumulate) {
    const Plan<Storage>& plan = context.plan;
    const int64_t hidden_width = rounded_up(plan.padded_projected, panel_width);
    const int64_t input_width = rounded_up(plan.padded_input, panel_width);
    const Compute* hidden_panels = context.hidden_panels + pairs.before * context.hidden_copies() * hidden_width;
    const Compute* input_panels = context.input_panels + pairs.before * context.input_copies() * input_width;
    int64_t first, last;
    split(plan.H, kTileRows, share.worker, share.workers, first, last);
    Compute* turned = context.room_of(share);
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t at = gate * plan.padded_hidden;
      if (context.wants_weight_hh) {
        const int64_t copy = hidden_width * pairs.count;
        weight_gradient<Compute>(context.grad_recurrent + at, plan.gate_stride,
                                 hidden_panels + (plan.untied_hidden ? gate * copy : 0), pairs, plan.padded_projected,
                                 first, last, turned, context.gradient_hh.gate(gate, pairs.group),
                                 context.gradient_hh.row_stride, accumulate);
      }
      if (context.wants_weight_ih) {
        const int64_t copy = input_width * pairs.count;
        weight_gradient<Compute>(context.grad_input_gates + at, plan.gate_stride,
                                 input_panels + (plan.untied_input ? gate * copy : 0), pairs, plan.padded_input, first,
                                 last, turned, context.gradient_ih.gate(gate, pairs.group),
                                 context.gradient_ih.row_stride, accumulate);
      }
    }
    if (!context.wants_weight_hr) return;
    split(plan.P, kTileRows, share.worker, share.workers, first, last);
    weight_gradient<Compute>(context.grad_projected, plan.projected_stride,
                             context.unprojected_panels + pairs.before * rounded_up(plan.padded_hidden, panel_width),
                             pairs, plan.padded_hidden, first, last, turned, context.gradient_hr.gate(0, pairs.group),
                             context.gradient_hr.row_stride, accumulate);
  }

  // dx = m_x (dr W_ih), row by row of the caller's input.
  static void input_gradient(const Context& context, const Share& share, int64_t first_step, int64_t first,
                             int64_t last) {
    const Plan<Storage>& plan = context.plan;
    const ColumnPanels<Compute> panels = context.input_column_panels();
    int64_t* ranks = reinterpret_cast<int64_t*>(context.room_of(share));
    Storage* grad_input = static_cast<Storage*>(context.params.grad_input);
    for (int64_t begin = 0; begin < plan.padded_input; begin += panel_width) {
      const int vectors = static_cast<int>(smaller(kTileVectors, (plan.padded_input - begin) / width));
      for_each_tile(last - first, [&](int64_t offset, int rows) {
        Compute sum[kTileRows * panel_width];
        Storage* to[kTileRows];
        for_each_pair(plan, first_step, first + offset, first + offset + rows,
                      [&](int64_t pair, int64_t rank, int64_t s) {
                        const int64_t m = pair - first - offset;
                        ranks[m] = rank;
                        to[m] = grad_input + (plan.position(rank, s) * plan.B + plan.order[rank]) * plan.I;
                      });
        const Compute* dr = context.grad_input_gates + (first + offset) * plan.gate_stride;
        if (plan.untied_input) {
          const auto mask_of = [&](int m, int gate) {
            return context.masks.input + (ranks[m] * 4 + gate) * plan.padded_input + begin;
          };
          masked_column_tile<Compute>(rows, vectors, dr, plan.gate_stride, panels, begin / panel_width,
                                      plan.padded_hidden, mask_of, sum);
        } else {
          column_tile<Compute>(rows, vectors, dr, plan.gate_stride, panels, begin / panel_width, offset / kTileRows,
                               4 * plan.padded_hidden, sum);
        }
        for (int m = 0; m < rows; ++m) {
          for (int v = 0; v < vectors; ++v) {
            const int64_t column = begin + v * width;
            V grad = load<Compute>(sum + m * panel_width + v * width);
            if (context.masks.input != nullptr && !plan.untied_input) {
              grad *= load<Compute>(context.masks.input + ranks[m] * plan.padded_input + column);
            }
            store_some(to[m] + column, grad, static_cast<int>(smaller(width, plan.I - column)));
          }
        }
      });
    }
  }

  template <class Pairs>
  static void column_sums(const Context& context, const Share& share, const Pairs& pairs) {
    const Plan<Storage>& plan = context.plan;
    Compute* gradient_bias = context.gradient_bias + pairs.group * 4 * plan.padded_hidden;
    int64_t first, last;
    split(plan.padded_hidden, width, share.worker, share.workers, first, last);
    for (int64_t unit = first; unit < last; unit += width) {
      if (context.wants_bias) {
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t at = gate * plan.padded_hidden + unit;
          V total = load<Compute>(gradient_bias + at), sum{};
          pairs.for_each([&](int64_t n, int64_t pair) {
            sum += load<Compute>(context.grad_gates + pair * plan.gate_stride + at);
            if (n % kSummedInARow != kSummedInARow - 1) return;
            total += sum;
            sum = V{};
          });
          store<Compute>(gradient_bias + at, total + sum);
        }
      }
      if (plan.in.options.norm == NormKind::Layer) layer_norm_column_sums(context, unit, pairs);
    }
  }

  // `rows`: of each gate.
  static void write_weight(const Context& context, const Share& share, const AccumulatedWeight<Compute>& gradient,
                           int64_t rows, int64_t columns, bool dropped, bool no_steps, void* result) {
    if (gradient.in_place && !no_steps) return;
    const Plan<Storage>& plan = context.plan;
    Compute* mask = context.room_of(share);
    int64_t first, last;
    split(rows, kTileRows, share.worker, share.workers, first, last);
    for (int gate = 0; gate < gradient.gates; ++gate) {
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t row = gate * rows + unit;
        if (dropped) {
          fill_weight_mask<Compute>(plan.weight_dropout, plan.key, plan.in.options.weight_mask_row, row, 0, columns,
                                    mask);
        }
        for (int64_t group = 0; group < plan.groups; ++group) {
          const Compute* from = gradient.gate(gate, group) + unit * gradient.row_stride;
          Storage* to = static_cast<Storage*>(result) + (group * gradient.gates * rows + row) * columns;
          for (int64_t column = 0; column < columns; column += width) {
            V value = no_steps ? V{} : load<Compute>(from + column);
            if (dropped) value *= load<Compute>(mask + column);
            store_some(to + column, value, static_cast<int>(smaller(width, columns - column)));
          }
        }
      }
    }
  }

  // The gradients of the initial states, and zeros for the padding.
  static void write_states(const Context& context, int64_t rank) {
    const Plan<Storage>& plan = context.plan;
    const BackwardParams& params = context.params;
    const int64_t b = plan.order[rank];
    for (int64_t unit = 0; unit < plan.P && params.grad_initial_hidden != nullptr; unit += width) {
      store_some(static_cast<Storage*>(params.grad_initial_hidden) + b * plan.P + unit,
                 load<Compute>(context.grad_hidden_state + rank * plan.projected_stride + unit),
                 static_cast<int>(smaller(width, plan.P - unit)));
    }
    for (int64_t unit = 0; unit < plan.H && params.grad_initial_cell != nullptr; unit += width) {
      store_some(static_cast<Compute*>(params.grad_initial_cell) + b * plan.H + unit,
                 load<Compute>(context.grad_cell_state + rank * plan.hidden_stride + unit), context.units_at(unit));
    }
    for (int64_t t = plan.length[rank]; t < plan.T; ++t) {
      clear_row(static_cast<Storage*>(params.grad_input), t * plan.B + b, plan.I);
      clear_row(static_cast<Storage*>(params.grad_hidden_probe), t * plan.B + b, plan.P);
      clear_row(static_cast<Compute*>(params.grad_cell_probe), t * plan.B + b, plan.H);
    }
  }

  template <class Value>
  static void clear_row(Value* rows, int64_t row, int64_t count) {
    if (rows != nullptr) __builtin_memset(rows + row * count, 0, static_cast<size_t>(count) * sizeof(Value));
  }

  static void write_columns(const Context& context, const Compute* sums, int64_t gates, void* result) {
    if (result == nullptr) return;
    const Plan<Storage>& plan = context.plan;
    for (int64_t gate = 0; gate < gates * plan.groups; ++gate) {  // one group's after the other's
      for (int64_t unit = 0; unit < plan.H; unit += width) {
        store_some(static_cast<Storage*>(result) + gate * plan.H + unit,
                   load<Compute>(sums + gate * plan.padded_hidden + unit), context.units_at(unit));
      }
    }
  }
};

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
