// The backward loop: the cell's gradients step by step, last step first, and the products after each chunk of steps.
#pragma once

#include "after_loop.h"
#include "batch_norm_backward.h"
#include "gradient_context.h"
#include "layer_norm_backward.h"
#include "projection_backward.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

template <class Storage>
class Backward {
  using Compute = ComputeOf<Storage>;
  using V = Vector<Compute>;
  using Context = BackwardContext<Storage>;
  static constexpr int width = kWidth<Compute>;
  static constexpr int panel_width = width * kTileVectors;

 public:
  static void run(const BackwardParams& params, int threads, RunTeam run_team) {
    Context context(params, threads);
    Arena measure(nullptr);
    context.take(measure);
    Workspace workspace(static_cast<size_t>(measure.used()));
    Arena arena(workspace.data());
    context.take(arena);
    context.plan.prepare();
    if (context.plan.asked == 1) return work(&context, 0, 1);
    run_team(context.plan.asked, work, &context);
  }

 private:
  static void work(void* given, int worker, int workers) {
    Context& context = *static_cast<Context*>(given);
    const Share share = context.plan.share(worker, workers);
    const Plan<Storage>& plan = context.plan;
    set_up(context, share);
    const int64_t chunks = (plan.longest + plan.steps_per_chunk - 1) / plan.steps_per_chunk;
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t first_step = chunk * plan.steps_per_chunk;
      const int64_t last_step = smaller(first_step + plan.steps_per_chunk, plan.longest);
      if (context.rebuilds) rebuild(context, share, first_step, last_step);
      run_steps(context, share, first_step, last_step);
      context.barrier.wait(share.workers);
      AfterLoop<Storage>::run_chunk(context, share, first_step, last_step, chunk == chunks - 1);
      context.barrier.wait(share.workers);
    }
    AfterLoop<Storage>::write_results(context, share, chunks == 0);
  }

  static void set_up(Context& context, const Share& share) {
    const Plan<Storage>& plan = context.plan;
    Compute* room = context.room_of(share);
    const bool by_rows = plan.division == Division::Rows;
    const int64_t hidden_panels = (share.last_projected - share.first_projected + panel_width - 1) / panel_width;
    int64_t first_panel = 0, last_panel = hidden_panels;
    if (by_rows) split(hidden_panels, 1, share.worker, share.workers, first_panel, last_panel);
    if (context.packed_hh != nullptr) {
      pack_column_panels(plan, static_cast<const Storage*>(plan.in.weight_hh), plan.P, plan.weight_dropout.drawn,
                         share.first_projected, share.last_projected, first_panel, last_panel, room,
                         context.packed_hidden_panels(share));
    }
    if (context.packed_hr != nullptr) pack_projection_columns(context, share);
    if (context.packed_ih != nullptr) {
      const int64_t input_panels = (plan.I + panel_width - 1) / panel_width;
      split(input_panels, 1, share.worker, share.workers, first_panel, last_panel);
      pack_column_panels(plan, static_cast<const Storage*>(plan.in.weight_ih), plan.I, false, 0, plan.I, first_panel,
                         last_panel, room, context.packed_ih);
    }
    if (context.rebuilds) {
      int64_t first_unit, last_unit;
      split(plan.padded_hidden, width, share.worker, share.workers, first_unit, last_unit);
      pack_gate_panels(plan, static_cast<const Storage*>(plan.in.weight_ih), plan.I, false, first_unit, last_unit, room,
                       context.packed_gates_ih);
      pack_gate_panels(plan, static_cast<const Storage*>(plan.in.weight_hh), plan.P, plan.weight_dropout.drawn,
                       first_unit, last_unit, room, context.packed_gates_hh);
    }
    if (share.worker == 0) {
      gather_bias(plan, context.bias);
      context.norm.fill(plan, context.bias, room);
      const int64_t units = plan.groups * plan.padded_hidden;
      clear(context.gradient_bias, 4 * units);
      clear(context.gradient_input_gain, 4 * units);
      clear(context.gradient_recurrent_gain, 4 * units);
      clear(context.gradient_cell_gain, units);
      clear(context.gradient_cell_shift, units);
    }
    context.masks.fill(plan, share.worker, share.workers);
    for (int64_t rank = share.worker; rank < plan.B; rank += share.workers) load_final_gradients(context, rank);
    context.barrier.wait(share.workers);
  }

  static void clear(Compute* values, int64_t count) {
    if (values != nullptr) __builtin_memset(values, 0, static_cast<size_t>(count) * sizeof(Compute));
  }

  static void load_final_gradients(const Context& context, int64_t rank) {
    const Plan<Storage>& plan = context.plan;
    const int64_t b = plan.order[rank];
    const Storage* hidden = static_cast<const Storage*>(context.params.grad_final_hidden);
    const Compute* cell = static_cast<const Compute*>(context.params.grad_final_cell);
    for (int64_t unit = 0; unit < plan.padded_projected; unit += width) {
      const int count = static_cast<int>(smaller(width, plan.P - unit));
      store<Compute>(context.grad_hidden_state + rank * plan.projected_stride + unit,
                     hidden == nullptr ? V{} : load_some(hidden + b * plan.P + unit, count));
    }
    for (int64_t unit = 0; unit < plan.padded_hidden; unit += width) {
      store<Compute>(context.grad_cell_state + rank * plan.hidden_stride + unit,
                     cell == nullptr ? V{} : load_some(cell + b * plan.H + unit, context.units_at(unit)));
    }
  }

  // What the forward did not keep: every h of the chunk is known, so one product brings all pre-activations back.
  static void rebuild(Context& context, const Share& share, int64_t first_step, int64_t last_step) {
    const Plan<Storage>& plan = context.plan;
    const int64_t pairs = plan.first[last_step] - plan.first[first_step];
    int64_t first, last;
    split(pairs, kTileRows, share.worker, share.workers, first, last);
    gather_inputs(plan, context.masks.input, first_step, first, last, context.inputs);
    gather_hidden(plan, static_cast<const Storage*>(context.params.saved.hidden), context.masks.hidden, first_step,
                  first, last, context.hidden_rows);
    Compute* input_gates = plan.has_norm ? context.rebuilt_input_gates : context.rebuilt_gates;
    gate_product<Compute>(context.inputs, plan.input_stride * context.input_copies(),
                          plan.untied_input ? plan.input_stride : 0, plan.I, context.packed_gates_ih, 0,
                          plan.padded_hidden, first, last, plan.padded_hidden, input_gates, plan.gate_stride, false);
    gate_product<Compute>(context.hidden_rows, plan.projected_stride * context.hidden_copies(),
                          plan.untied_hidden ? plan.projected_stride : 0, plan.P, context.packed_gates_hh, 0,
                          plan.padded_hidden, first, last, plan.padded_hidden, context.rebuilt_gates, plan.gate_stride,
                          !plan.has_norm);
    if (!plan.has_norm) {
      const int64_t padded = plan.padded_hidden;
      for (int64_t pair = first; pair < last; ++pair) {
        Compute* row = context.rebuilt_gates + pair * plan.gate_stride;
        for (int64_t unit = 0; unit < padded; unit += width) {
          V z[4];
          for (int gate = 0; gate < 4; ++gate) {
            z[gate] = load<Compute>(row + gate * padded + unit) + load<Compute>(context.bias + gate * padded + unit);
          }
          const Gates<V> gates = activated<Compute>(z);
          store<Compute>(row + unit, gates.i);
          store<Compute>(row + padded + unit, gates.f);
          store<Compute>(row + 2 * padded + unit, gates.g);
          store<Compute>(row + 3 * padded + unit, gates.o);
        }
      }
    }
    context.barrier.wait(share.workers);
  }

  static void run_steps(Context& context, const Share& share, int64_t first_step, int64_t last_step) {
    const Plan<Storage>& plan = context.plan;
    GradientRow<Storage>* rows = context.worker_rows + plan.B * share.worker;
    BatchNormBackward<Storage> batch_norm(context, share);
    for (int64_t s = last_step - 1; s >= first_step; --s) {
      const int64_t count = plan.rows_running(share, s);
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = row_at(context, share.first_rank + i * share.rank_step, s, first_step);
      }
      if (plan.projected) {
        enter_projection(context, share, rows, count);
        if (plan.division == Division::Units) context.barrier.wait(share.workers);
        leave_projection(context, share, rows, count);
      }
      switch (plan.in.options.norm) {
        case NormKind::None: plain_step(context, share, rows, count); break;
        case NormKind::Batch: batch_norm.step(s, rows, count); break;
        case NormKind::Layer: layer_norm_step_backward(context, share, rows, count); break;
      }
      if (plan.division == Division::Units) context.barrier.wait(share.workers);
      hidden_gradient(context, share, rows, count);
    }
    if (plan.in.options.norm == NormKind::Batch) batch_norm.finish_sequence(first_step, last_step);
  }

  static GradientRow<Storage> row_at(const Context& context, int64_t rank, int64_t s, int64_t first_step) {
    const Plan<Storage>& plan = context.plan;
    const BackwardParams& params = context.params;
    GradientRow<Storage> row;
    row.rank = rank;
    row.b = plan.order[rank];
    row.t = plan.position(rank, s);
    row.reset = plan.reset_at(rank, s);
    const int64_t at = (row.t * plan.B + row.b) * plan.H;
    const int64_t pair = plan.first[s] - plan.first[first_step] + rank;
    const int64_t scratch = pair * plan.gate_stride;
    const char* gates = static_cast<const char*>(params.saved.gates);
    const char* input_gates = static_cast<const char*>(params.saved.input_gates);
    const int64_t kept = 4 * at * kept_bytes<Storage>(plan.has_norm);
    row.saved_gates = gates == nullptr ? nullptr : gates + kept;
    row.saved_input_gates = input_gates == nullptr ? nullptr : input_gates + kept;
    row.rebuilt_gates = context.rebuilt_gates == nullptr ? nullptr : context.rebuilt_gates + scratch;
    row.rebuilt_input_gates = context.rebuilt_input_gates == nullptr ? nullptr : context.rebuilt_input_gates + scratch;
    row.previous_cell = nullptr;
    if (!row.reset && s > 0) {
      row.previous_cell =
          static_cast<const Compute*>(params.saved.cells) + (plan.position(rank, s - 1) * plan.B + row.b) * plan.H;
    } else if (!row.reset && plan.in.initial_cell != nullptr) {
      row.previous_cell = static_cast<const Compute*>(plan.in.initial_cell) + row.b * plan.H;
    }
    row.grad_output = params.grad_output == nullptr
                          ? nullptr
                          : static_cast<const Storage*>(params.grad_output) + row.t * params.grad_output_step_stride +
                                row.b * params.grad_output_row_stride;
    row.grad_cell = params.grad_cells == nullptr ? nullptr : static_cast<const Compute*>(params.grad_cells) + at;
    row.grad_hidden_state = context.grad_hidden_state + rank * plan.projected_stride;
    row.grad_cell_state = context.grad_cell_state + rank * plan.hidden_stride;
    row.grad_direct = context.grad_direct == nullptr ? nullptr : context.grad_direct + rank * plan.projected_stride;
    row.grad_projected =
        context.grad_projected == nullptr ? nullptr : context.grad_projected + pair * plan.projected_stride;
    row.grad_unprojected =
        context.grad_unprojected == nullptr ? nullptr : context.grad_unprojected + rank * plan.hidden_stride;
    row.unprojected = context.unprojected == nullptr ? nullptr : context.unprojected + pair * plan.hidden_stride;
    row.grad_hidden_probe = params.grad_hidden_probe == nullptr
                                ? nullptr
                                : static_cast<Storage*>(params.grad_hidden_probe) + (row.t * plan.B + row.b) * plan.P;
    row.grad_cell_probe =
        params.grad_cell_probe == nullptr ? nullptr : static_cast<Compute*>(params.grad_cell_probe) + at;
    row.grad_gates = context.grad_gates + scratch;
    row.grad_recurrent = context.grad_recurrent + scratch;
    row.grad_input_gates = context.grad_input_gates + scratch;
    row.cell_terms = context.cell_terms == nullptr ? nullptr : context.cell_terms + pair * 2 * plan.padded_hidden;
    return row;
  }

  static void plain_step(const Context& context, const Share& share, const GradientRow<Storage>* rows, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const GradientRow<Storage>& row = rows[i];
      for (int64_t unit = share.first_unit; unit < share.last_unit; unit += width) {
        const Gates<V> gates = {context.kept(row, 0, unit), context.kept(row, 1, unit), context.kept(row, 2, unit),
                                context.kept(row, 3, unit)};
        CellTrace<Compute> trace = context.enter_cell(row, unit, gates);
        context.leave_output(row, unit, trace, trace.candidate);
        context.leave_cell(row, unit, trace, trace.grad_normalised);
      }
    }
  }

  // dh_{s-1} = m_h (da W_hh) + zoneout's share; 0 through a reset. Untied: each gate's share has its own mask.
  static void hidden_gradient(const Context& context, const Share& share, const GradientRow<Storage>* rows,
                              int64_t count) {
    const Plan<Storage>& plan = context.plan;
    const ColumnPanels<Compute> panels = context.hidden_column_panels(share);
    const int64_t row_stride = share.rank_step * plan.gate_stride;
    for (int64_t begin = share.first_projected; begin < share.last_projected; begin += panel_width) {
      const int64_t panel = (begin - share.first_projected) / panel_width;
      const int vectors = static_cast<int>(smaller(kTileVectors, (share.last_projected - begin) / width));
      for_each_tile(count, [&](int64_t first, int tile_rows) {
        Compute sum[kTileRows * panel_width];
        const Compute* da = rows[first].grad_recurrent;
        if (plan.untied_hidden) {
          const auto mask_of = [&](int m, int gate) {
            return context.masks.hidden + (rows[first + m].rank * 4 + gate) * plan.padded_projected + begin;
          };
          masked_column_tile<Compute>(tile_rows, vectors, da, row_stride, panels, panel, plan.padded_hidden, mask_of,
                                      sum);
        } else {
          column_tile<Compute>(tile_rows, vectors, da, row_stride, panels, panel, first / kTileRows,
                               4 * plan.padded_hidden, sum);
        }
        for (int m = 0; m < tile_rows; ++m) {
          const GradientRow<Storage>& row = rows[first + m];
          for (int v = 0; v < vectors; ++v) {
            const int64_t unit = begin + v * width;
            V grad = load<Compute>(sum + m * panel_width + v * width);
            if (context.masks.hidden != nullptr && !plan.untied_hidden) {
              grad *= load<Compute>(context.masks.hidden + row.rank * plan.padded_projected + unit);
            }
            if (row.grad_direct != nullptr) grad += load<Compute>(row.grad_direct + unit);
            store<Compute>(row.grad_hidden_state + unit, row.reset ? V{} : grad);
          }
        }
      });
    }
  }
};

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
