// The forward loop (section "One step" of the README's equations): input product, steps, results.
#pragma once

#include "batch_norm.h"
#include "context.h"
#include "layer_norm.h"
#include "projection.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

template <class Storage>
class Forward {
  using Compute = ComputeOf<Storage>;
  using V = Vector<Compute>;
  static constexpr int width = kWidth<Compute>;

 public:
  static void run(const ForwardParams& params, int threads, RunTeam run_team) {
    ForwardContext<Storage> context(params, threads);
    Arena measure(nullptr);
    context.take(measure);
    Workspace workspace(static_cast<size_t>(measure.used()));
    Arena arena(workspace.data());
    context.take(arena);
    context.plan.prepare();
    advise_results(context);
    if (context.plan.asked == 1) return work(&context, 0, 1);
    run_team(context.plan.asked, work, &context);
  }

 private:
  static void work(void* given, int worker, int workers) {
    ForwardContext<Storage>& context = *static_cast<ForwardContext<Storage>*>(given);
    const Share share = context.plan.share(worker, workers);
    set_up(context, share);
    const Plan<Storage>& plan = context.plan;
    for (int64_t s = 0; s < plan.longest; s += plan.steps_per_chunk) {
      run_chunk(context, share, s, smaller(s + plan.steps_per_chunk, plan.longest));
    }
    write_final_states(context, share);
  }

  // Large results are fresh memory; a page fault every 4 KB would cost more than writing them.
  static void advise_results(const ForwardContext<Storage>& context) {
    const Plan<Storage>& plan = context.plan;
    const LayerOutputs& out = context.params.out;
    const size_t states = static_cast<size_t>(plan.T * plan.B * plan.H);
    advise(out.output, static_cast<size_t>(plan.T * plan.B * plan.P) * sizeof(Storage));
    advise(out.cells, states * sizeof(Compute));
    advise(out.gates, 4 * states * static_cast<size_t>(kept_bytes<Storage>(plan.has_norm)));
    advise(out.input_gates, 4 * states * static_cast<size_t>(kept_bytes<Storage>(true)));
  }
  static void advise(void* result, size_t bytes) {
    constexpr size_t kLarge = size_t{8} << 20;
    if (result != nullptr && bytes >= kLarge) advise_huge_pages(result, bytes);
  }

  static void set_up(ForwardContext<Storage>& context, const Share& share) {
    const Plan<Storage>& plan = context.plan;
    int64_t first_unit = share.first_unit, last_unit = share.last_unit;
    if (plan.division == Division::Rows) {
      split(plan.padded_hidden, width, share.worker, share.workers, first_unit, last_unit);
    }
    Compute* room = context.room_of(share);
    if (context.packed_ih != nullptr) {
      pack_gate_panels(plan, static_cast<const Storage*>(plan.in.weight_ih), plan.I, false, first_unit, last_unit, room,
                       context.packed_ih);
    }
    if (context.packed_hh != nullptr) {
      pack_gate_panels(plan, context.weight_hh(), plan.P, plan.weight_dropout.drawn, first_unit, last_unit, room,
                       context.packed_hh);
    }
    if (context.packed_hr != nullptr) pack_projection(context, share);
    if (share.worker == 0) {
      gather_bias(plan, context.bias);
      context.norm.fill(plan, context.bias, room);
    }
    context.masks.fill(plan, share.worker, share.workers);
    for (int64_t rank = share.worker; rank < plan.B; rank += share.workers) {
      load_initial_state(context, rank);
      clear_padding(context, rank);
    }
    if (share.worker == 0 && plan.in.options.norm == NormKind::Batch) clear_unreached_statistics(context);
    context.barrier.wait(share.workers);
  }

  static void load_initial_state(ForwardContext<Storage>& context, int64_t rank) {
    const Plan<Storage>& plan = context.plan;
    const int64_t b = plan.order[rank];
    const Storage* hidden = static_cast<const Storage*>(plan.in.initial_hidden);
    const Compute* cell = static_cast<const Compute*>(plan.in.initial_cell);
    StepRow<Storage> row{};
    row.rank = rank;
    row.next = context.exchanged[0] + rank * context.exchange_stride();
    const bool reset = plan.length[rank] > 0 && plan.reset_at(rank, 0);
    for (int64_t unit = 0; unit < plan.padded_projected; unit += width) {
      V h{};
      if (hidden != nullptr && !reset) {
        h = load_some(hidden + b * plan.P + unit, static_cast<int>(smaller(width, plan.P - unit)));
      }
      store<Compute>(context.hidden + rank * plan.projected_stride + unit, h);
      context.publish(row, unit, h);
    }
    for (int64_t unit = 0; unit < plan.padded_hidden; unit += width) {
      V c{};
      if (cell != nullptr && !reset) {
        c = load_some(cell + b * plan.H + unit, static_cast<int>(smaller(width, plan.H - unit)));
      }
      store<Compute>(context.cell + rank * plan.hidden_stride + unit, c);
    }
  }

  static void clear_padding(const ForwardContext<Storage>& context, int64_t rank) {
    const Plan<Storage>& plan = context.plan;
    const LayerOutputs& out = context.params.out;
    const size_t hidden_bytes = static_cast<size_t>(plan.P) * sizeof(Storage);
    const size_t kept_row = 4 * static_cast<size_t>(plan.H * kept_bytes<Storage>(plan.has_norm));
    for (int64_t t = plan.length[rank]; t < plan.T; ++t) {
      const int64_t at = t * plan.B + plan.order[rank];
      clear(out.output, at, hidden_bytes);
      clear(out.hidden, at, hidden_bytes);
      clear(out.gates, at, kept_row);
      clear(out.input_gates, at, kept_row);
      clear(out.cells, at, static_cast<size_t>(plan.H) * sizeof(Compute));
      if (plan.in.options.norm != NormKind::Layer) continue;
      for (void* statistics : {out.input_statistics, out.recurrent_statistics, out.cell_statistics}) {
        if (statistics == nullptr) continue;
        for (int moment = 0; moment < 2; ++moment) {
          static_cast<Compute*>(statistics)[(t * 2 + moment) * plan.B + plan.order[rank]] = 0;
        }
      }
    }
  }

  static void clear(void* rows, int64_t at, size_t bytes) {
    if (rows != nullptr) __builtin_memset(static_cast<char*>(rows) + at * static_cast<int64_t>(bytes), 0, bytes);
  }

  static void clear_unreached_statistics(const ForwardContext<Storage>& context) {
    const Plan<Storage>& plan = context.plan;
    const LayerOutputs& out = context.params.out;
    const size_t gates = 8 * static_cast<size_t>(plan.H) * sizeof(Compute);
    for (int64_t s = plan.longest; s < plan.T; ++s) {
      if (!plan.in.options.norm_input_sequence) clear(out.input_statistics, s, gates);
      clear(out.recurrent_statistics, s, gates);
      clear(out.cell_statistics, s, gates / 4);
    }
    if (plan.in.options.norm_input_sequence && plan.longest == 0) clear(out.input_statistics, 0, gates);
  }

  static void run_chunk(ForwardContext<Storage>& context, const Share& share, int64_t first_step, int64_t last_step) {
    const Plan<Storage>& plan = context.plan;
    const int64_t pairs = plan.first[last_step] - plan.first[first_step];
    const bool by_rows = plan.division == Division::Rows;
    int64_t first, last;
    split(pairs, kTileRows, share.worker, share.workers, first, last);
    const Compute* left = context.inputs;
    int64_t left_stride = plan.input_stride * (plan.untied_input ? 4 : 1);
    if (context.inputs_in_place) {
      left = reinterpret_cast<const Compute*>(static_cast<const Storage*>(plan.in.input) +
                                              first_step * plan.in.input_step_stride);
      left_stride = plan.in.input_row_stride;
    } else {
      gather_inputs(plan, context.masks.input, first_step, first, last, context.inputs);
      if (!by_rows) context.barrier.wait(share.workers);
    }
    const int64_t copy_stride = plan.untied_input ? plan.input_stride : 0;
    const int64_t first_pair = by_rows ? first : 0, last_pair = by_rows ? last : pairs;
    if (context.packed_ih == nullptr) {
      direct_gate_product(plan, left, left_stride, copy_stride, plan.I, plan.in.weight_ih, share.first_unit,
                          share.last_unit, first_pair, last_pair, context.input_gates);
    } else {
      gate_product<Compute>(left, left_stride, copy_stride, plan.I, context.packed_ih, share.first_unit,
                            share.last_unit, first_pair, last_pair, plan.padded_hidden, context.input_gates,
                            plan.gate_stride, false);
    }
    if (by_rows) context.barrier.wait(share.workers);
    BatchNormForward<Storage> batch_norm(context, share);
    if (plan.in.options.norm == NormKind::Batch) batch_norm.take_sequence_statistics(pairs);

    StepRow<Storage>* rows = context.worker_rows + plan.B * share.worker;
    for (int64_t s = first_step; s < last_step; ++s) {
      const int64_t count = plan.rows_running(share, s);
      for (int64_t i = 0; i < count; ++i)
        rows[i] = row_at(context, share.first_rank + i * share.rank_step, s, first_step);
      switch (plan.in.options.norm) {
        case NormKind::None: plain_step(context, share, s, rows, count); break;
        case NormKind::Batch: batch_norm.step(s, rows, count); break;
        case NormKind::Layer: layer_norm_step(context, share, s, rows, count); break;
      }
      if (plan.projected) {
        if (!by_rows) context.barrier.wait(share.workers);
        project(context, share, rows, count);
      }
      if (!by_rows) context.barrier.wait(share.workers);
    }
    if (by_rows) context.barrier.wait(share.workers);
  }

  static StepRow<Storage> row_at(const ForwardContext<Storage>& context, int64_t rank, int64_t s, int64_t first_step) {
    const Plan<Storage>& plan = context.plan;
    const LayerOutputs& out = context.params.out;
    StepRow<Storage> row;
    row.rank = rank;
    row.b = plan.order[rank];
    row.t = plan.position(rank, s);
    row.input_gates = context.input_gates + (plan.first[s] - plan.first[first_step] + rank) * plan.gate_stride;
    row.cell = context.cell + rank * plan.hidden_stride;
    row.hidden = context.hidden + rank * plan.projected_stride;
    row.unprojected = plan.projected ? context.unprojected + rank * plan.hidden_stride : nullptr;
    row.next = context.exchanged[(s + 1) & 1] + rank * context.exchange_stride();
    row.reset_next = s + 1 < plan.length[rank] && plan.reset_at(rank, s + 1);
    const int64_t at = (row.t * plan.B + row.b) * plan.H, hidden_at = (row.t * plan.B + row.b) * plan.P;
    row.output = out.output == nullptr ? nullptr : static_cast<Storage*>(out.output) + hidden_at;
    row.saved_hidden = out.hidden == nullptr ? nullptr : static_cast<Storage*>(out.hidden) + hidden_at;
    const int64_t kept = 4 * at * kept_bytes<Storage>(plan.has_norm);
    row.saved_gates = out.gates == nullptr ? nullptr : static_cast<char*>(out.gates) + kept;
    row.saved_input_gates = out.input_gates == nullptr ? nullptr : static_cast<char*>(out.input_gates) + kept;
    row.saved_cell = out.cells == nullptr ? nullptr : static_cast<Compute*>(out.cells) + at;
    return row;
  }

  // Without a norm, one vector of units at a time.
  static void plain_step(const ForwardContext<Storage>& context, const Share& share, int64_t s,
                         const StepRow<Storage>* rows, int64_t count) {
    const Plan<Storage>& plan = context.plan;
    const int64_t vectors = (share.last_unit - share.first_unit) / width;
    Compute* a = context.room_of(share);  // [row][gate][unit]
    const bool backwards = (s & 1) != 0;  // the panels that were used last are still in cache
    for (int64_t n = 0; n < vectors; ++n) {
      const int64_t unit = share.first_unit + (backwards ? vectors - 1 - n : n) * width;
      const int units = static_cast<int>(smaller(width, plan.H - unit));
      // All rows' products first, then all their cells: each change between the two drains the pipeline once.
      for_each_tile(count, [&](int64_t first, int tile_rows) {
        for (int m = 0; m < tile_rows; ++m) context.prefetch(rows[first + m], unit);
        recurrent_tile(context, share, s, unit, backwards ? unit - width : unit + width, first, tile_rows,
                       a + first * 4 * width, 4 * width, width);
      });
      for (int64_t i = 0; i < count; ++i) {
        const StepRow<Storage>& row = rows[i];
        V z[4];
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t at = gate * plan.padded_hidden + unit;
          z[gate] = load<Compute>(a + (i * 4 + gate) * width) + load<Compute>(row.input_gates + at) +
                    load<Compute>(context.bias + at);
        }
        const StepMasks<Compute> step = step_masks(plan, context.masks, row.rank, row.t, unit);
        V previous_cell, candidate;
        const Gates<V> gates = context.begin_cell(row, unit, z, step, previous_cell, candidate);
        if (row.saved_gates != nullptr) {
          constexpr int64_t bytes = kept_bytes<Storage>(false);
          char* to = row.saved_gates + unit * bytes;
          keep_activation<Storage>(to, gates.i, false, units);
          keep_activation<Storage>(to + plan.H * bytes, gates.f, false, units);
          keep_activation<Storage>(to + 2 * plan.H * bytes, gates.g, true, units);
          keep_activation<Storage>(to + 3 * plan.H * bytes, gates.o, false, units);
        }
        context.finish_cell(row, unit, step, previous_cell, gates.o, candidate, candidate);
      }
    }
  }

  static void write_final_states(ForwardContext<Storage>& context, const Share& share) {
    const Plan<Storage>& plan = context.plan;
    context.barrier.wait(share.workers);
    for (int64_t rank = share.worker; rank < plan.B; rank += share.workers) {
      const int64_t b = plan.order[rank];
      for (int64_t unit = 0; unit < plan.P; unit += width) {
        store_some(static_cast<Storage*>(context.params.out.final_hidden) + b * plan.P + unit,
                   load<Compute>(context.hidden + rank * plan.projected_stride + unit),
                   static_cast<int>(smaller(width, plan.P - unit)));
      }
      for (int64_t unit = 0; unit < plan.H; unit += width) {
        store_some(static_cast<Compute*>(context.params.out.final_cell) + b * plan.H + unit,
                   load<Compute>(context.cell + rank * plan.hidden_stride + unit),
                   static_cast<int>(smaller(width, plan.H - unit)));
      }
    }
  }
};

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
