// The buffers of one forward call, and one row of the batch at one step.
#pragma once

#include "kept.h"
#include "products.h"
#include "step.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

// Gains and shifts, padded; what all norms share. The shifts of both pre-activations stand in `bias`.
template <class Storage>
struct NormTables {
  using Compute = ComputeOf<Storage>;
  Compute* input_gain = nullptr;      // [4][padded_hidden]
  Compute* recurrent_gain = nullptr;  // [4][padded_hidden]
  Compute* cell_gain = nullptr;       // [padded_hidden]
  Compute* cell_shift = nullptr;      // [padded_hidden]

  void take(const Plan<Storage>& plan, Arena& arena) {
    if (!plan.has_norm) return;
    input_gain = arena.take<Compute>(4 * plan.padded_hidden);
    recurrent_gain = arena.take<Compute>(4 * plan.padded_hidden);
    cell_gain = arena.take<Compute>(plan.padded_hidden);
    cell_shift = arena.take<Compute>(plan.padded_hidden);
  }

  // Adds the shifts of layer norm to `bias`; `room` is 4 padded_hidden values.
  void fill(const Plan<Storage>& plan, Compute* bias, Compute* room) const {
    if (!plan.has_norm) return;
    const NormParameters& norm = plan.in.norm;
    gather_norm_parameter(plan, norm.input_weight, 4, Compute(1), input_gain);
    gather_norm_parameter(plan, norm.recurrent_weight, 4, Compute(1), recurrent_gain);
    gather_norm_parameter(plan, norm.cell_weight, 1, Compute(1), cell_gain);
    gather_norm_parameter(plan, norm.cell_bias, 1, Compute(0), cell_shift);
    for (const void* shift : {norm.input_bias, norm.recurrent_bias}) {
      if (shift == nullptr) continue;
      gather_norm_parameter(plan, shift, 4, Compute(0), room);
      for (int64_t k = 0; k < 4 * plan.padded_hidden; ++k) bias[k] += room[k];
    }
  }
};

template <class Storage>
struct StepRow {
  using Compute = ComputeOf<Storage>;
  int64_t rank, b, t;
  const Compute* input_gates;  // r, in scratch: [gate][unit]
  Compute* cell;               // carried
  Compute* hidden;             // carried
  Compute* next;               // h as the next step's product reads it
  Compute* unprojected;        // u = o tanh(c), of which h is a projection; null without one
  bool reset_next;             // the next step begins from zero
  // Rows of the results, or null.
  Storage* output;
  Storage* saved_hidden;
  char* saved_gates;  // as kept.h lays them out
  char* saved_input_gates;
  Compute* saved_cell;
};

template <class Storage>
struct ForwardContext {
  using Compute = ComputeOf<Storage>;

  const ForwardParams& params;
  Plan<Storage> plan;
  MaskTables<Storage> masks;
  NormTables<Storage> norm;
  Barrier barrier;
  Compute* packed_ih = nullptr;  // gate panels; null: the weight is read where it stands
  Compute* packed_hh = nullptr;
  Compute* packed_hr = nullptr;                // panels of four vectors of units of h: [unit of c][unit of h]
  Compute* bias = nullptr;                     // [4][padded_hidden]
  Compute* inputs = nullptr;                   // the chunk's inputs, unless they are read where they stand
  Compute* input_gates = nullptr;              // the chunk's r: [pair][4][padded_hidden]
  Compute* sequence_moments = nullptr;         // batch norm pooled over the sequence: [mean, variance][gate][unit]
  Compute* recurrent_gates = nullptr;          // layer norm: one step's a: [rank][4][padded_hidden]
  Compute* cell = nullptr;                     // [rank][padded_hidden]
  Compute* hidden = nullptr;                   // [rank][padded_projected]
  Compute* unprojected = nullptr;              // [rank][padded_hidden]
  Compute* exchanged[2] = {nullptr, nullptr};  // h as the product reads it, this step's and the next's
  Compute* worker_room = nullptr;
  int64_t worker_room_size = 0;
  StepRow<Storage>* worker_rows = nullptr;  // [worker][B]
  bool inputs_in_place;

  ForwardContext(const ForwardParams& given, int threads) : params(given), plan(given.in, threads) {
    inputs_in_place = sizeof(Storage) == sizeof(Compute) && plan.in.lengths == nullptr && !plan.in.options.reverse &&
                      !plan.input_dropout.drawn &&
                      (plan.T == 1 || plan.in.input_step_stride == plan.B * plan.in.input_row_stride);
    const int64_t columns = larger(larger(plan.I, plan.H), plan.P);
    const int64_t pack_room = (kWidth<Compute> + 1) * rounded_up(columns, 4 * kWidth<Compute>);
    const int64_t norm_room = plan.in.options.norm == NormKind::Batch   ? plan.B * 11 * kWidth<Compute>
                              : plan.in.options.norm == NormKind::Layer ? 7 * plan.padded_hidden
                                                                        : plan.B * 4 * kWidth<Compute>;
    worker_room_size = rounded_up(larger(larger(pack_room, norm_room), 4 * plan.padded_hidden), kWidth<Compute>);
  }

  const Storage* weight_hh() const { return static_cast<const Storage*>(plan.in.weight_hh); }
  const Storage* weight_hr() const { return static_cast<const Storage*>(plan.in.weight_hr); }
  int hidden_copies() const { return plan.untied_hidden ? 4 : 1; }
  int64_t exchange_stride() const { return hidden_copies() * plan.projected_stride; }

  void take(Arena& arena) {
    plan.take_tables(arena);
    masks.take(plan, arena);
    norm.take(plan, arena);
    if (!plan.few_pairs) packed_ih = arena.take<Compute>(4 * plan.padded_hidden * plan.I);
    if (!plan.few_pairs || plan.weight_dropout.drawn) packed_hh = arena.take<Compute>(4 * plan.padded_hidden * plan.P);
    if (plan.projected && !plan.few_pairs) {
      packed_hr = arena.take<Compute>((plan.padded_projected + plan.asked * kPanelWidth<Compute>)*plan.H);
    }
    bias = arena.take<Compute>(4 * plan.padded_hidden);
    if (!inputs_in_place) {
      inputs = arena.take<Compute>(plan.largest_chunk * plan.input_stride * (plan.untied_input ? 4 : 1));
    }
    input_gates = arena.take<Compute>(plan.largest_chunk * plan.gate_stride);
    if (plan.in.options.norm == NormKind::Layer) recurrent_gates = arena.take<Compute>(plan.B * plan.gate_stride);
    if (plan.in.options.norm == NormKind::Batch) sequence_moments = arena.take<Compute>(8 * plan.padded_hidden);
    cell = arena.take<Compute>(plan.B * plan.hidden_stride);
    hidden = arena.take<Compute>(plan.B * plan.projected_stride);
    if (plan.projected) unprojected = arena.take<Compute>(plan.B * plan.hidden_stride);
    for (auto& buffer : exchanged) buffer = arena.take<Compute>(plan.B * exchange_stride());
    worker_room = arena.take<Compute>(worker_room_size * plan.asked);
    worker_rows = arena.take<StepRow<Storage>>(plan.B * plan.asked);
  }

  Compute* room_of(const Share& share) const { return worker_room + worker_room_size * share.worker; }

  // The panels of W_hr that a worker multiplies with: one set for all, or a set of its own units of h.
  Compute* packed_projection(const Share& share) const {
    if (plan.division == Division::Rows) return packed_hr;
    return packed_hr + (share.first_projected + share.worker * kPanelWidth<Compute>)*plan.H;
  }

  // Writes h as the next product reads it: through the hidden masks, and 0 where the next step resets the row.
  FUSEDREG_METHOD void publish(const StepRow<Storage>& row, int64_t unit, Vector<Compute> value) const {
    if (row.reset_next) value = Vector<Compute>{};
    if (masks.hidden == nullptr) return store<Compute>(row.next + unit, value);
    const int copies = hidden_copies();
    const Compute* mask = masks.hidden + row.rank * copies * plan.padded_projected + unit;
    for (int copy = 0; copy < copies; ++copy) {
      store<Compute>(row.next + copy * plan.projected_stride + unit,
                     value * load<Compute>(mask + copy * plan.padded_projected));
    }
  }

  // Asks for what the cell of these units will read and write, so that it arrives while the product runs: rows stand
  // too far apart for the processor to guess.
  FUSEDREG_METHOD void prefetch(const StepRow<Storage>& row, int64_t unit) const {
    for (int gate = 0; gate < 4; ++gate) {
      __builtin_prefetch(row.input_gates + gate * plan.padded_hidden + unit);
      if (row.saved_gates != nullptr) {
        __builtin_prefetch(row.saved_gates + (gate * plan.H + unit) * kept_bytes<Storage>(plan.has_norm), 1);
      }
      if (row.saved_input_gates != nullptr) {
        __builtin_prefetch(row.saved_input_gates + (gate * plan.H + unit) * kept_bytes<Storage>(true), 1);
      }
    }
    __builtin_prefetch(row.cell + unit, 1);
    if (row.saved_cell != nullptr) __builtin_prefetch(row.saved_cell + unit, 1);
    if (plan.projected) return;
    __builtin_prefetch(row.hidden + unit, 1);
    __builtin_prefetch(row.next + unit, 1);
    if (row.output != nullptr) __builtin_prefetch(row.output + unit, 1);
  }

  // Keeps the raw pre-activations of one gate, which the backward of a norm needs.
  FUSEDREG_METHOD void keep_pre_activations(const StepRow<Storage>& row, int gate, int64_t unit, Vector<Compute> a,
                                            Vector<Compute> r) const {
    const int count = static_cast<int>(smaller(kWidth<Compute>, plan.H - unit));
    const int64_t at = (gate * plan.H + unit) * kept_bytes<Storage>(true);
    if (row.saved_gates != nullptr) keep_raw<Storage>(row.saved_gates + at, a, count);
    if (row.saved_input_gates != nullptr) keep_raw<Storage>(row.saved_input_gates + at, r, count);
  }

  // The second half of a cell, from o and the candidate cell (and what N_c made of it) to all that is carried and
  // returned; with a projection, as far as what is projected.
  FUSEDREG_METHOD void finish_cell(const StepRow<Storage>& row, int64_t unit, const StepMasks<Compute>& step,
                                   Vector<Compute> previous_cell, Vector<Compute> output_gate,
                                   Vector<Compute> candidate, Vector<Compute> normalised) const {
    using V = Vector<Compute>;
    const V unprojected = output_gate * tanh(normalised);
    const V next_cell = plan.zones_cell() ? zoned(step.zone_cell, previous_cell, candidate) : candidate;
    if (plan.projected) {
      store<Compute>(row.unprojected + unit, unprojected);
    } else {
      finish_hidden(row, unit, step, unprojected);
    }
    if (row.saved_cell != nullptr) {
      store_some(row.saved_cell + unit, next_cell, static_cast<int>(smaller(kWidth<Compute>, plan.H - unit)));
    }
    store<Compute>(row.cell + unit, row.reset_next ? V{} : next_cell);
  }

  // From h_candidate to all that is carried and returned of h.
  FUSEDREG_METHOD void finish_hidden(const StepRow<Storage>& row, int64_t unit, const StepMasks<Compute>& step,
                                     Vector<Compute> candidate) const {
    using V = Vector<Compute>;
    const int count = static_cast<int>(smaller(kWidth<Compute>, plan.P - unit));
    V next_hidden = candidate;
    if (plan.zones_hidden()) next_hidden = zoned(step.zone_hidden, load<Compute>(row.hidden + unit), candidate);
    next_hidden = rounded_to<Storage>(next_hidden);
    if (row.output != nullptr) {
      const V returned = plan.in.options.zoneout_candidate ? candidate : next_hidden;
      store_some(row.output + unit, plan.output_is_hidden ? returned : returned * step.output, count);
    }
    if (row.saved_hidden != nullptr) store_some(row.saved_hidden + unit, next_hidden, count);
    publish(row, unit, next_hidden);
    store<Compute>(row.hidden + unit, row.reset_next ? V{} : next_hidden);
  }

  // The first half, from the pre-activations.
  FUSEDREG_METHOD Gates<Vector<Compute>> begin_cell(const StepRow<Storage>& row, int64_t unit,
                                                    const Vector<Compute> (&z)[4], const StepMasks<Compute>& step,
                                                    Vector<Compute>& previous_cell, Vector<Compute>& candidate) const {
    const Gates<Vector<Compute>> gates = activated<Compute>(z);
    previous_cell = load<Compute>(row.cell + unit);
    candidate = candidate_cell(gates, previous_cell, step.update, step.cell);
    return gates;
  }
};

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
