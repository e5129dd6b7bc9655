// The buffers of one backward call, one row of the batch at one step on the way back, and the cell's backward.
#pragma once

#include "context.h"
#include "moments.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

template <class Storage>
struct GradientRow {
  using Compute = ComputeOf<Storage>;
  int64_t rank, b, t;
  bool reset;  // the step began from zero
  // What the forward kept, or the rebuilt scratch rows: i, f, g, o activated; with a norm a, and r.
  const char* saved_gates;
  const char* saved_input_gates;
  const Compute* rebuilt_gates;
  const Compute* rebuilt_input_gates;
  const Compute* previous_cell;  // null: 0
  const Storage* grad_output;    // null: 0
  const Compute* grad_cell;      // null: 0
  Compute* grad_hidden_state;    // of h_s, from the steps after
  Compute* grad_cell_state;      // of c_s
  Compute* grad_direct;          // zoneout's share of h_{s-1}'s
  // With a projection: of h_candidate, of u = o tanh(c), and u itself where W_hr's gradient is wanted.
  Compute* grad_projected;
  Compute* grad_unprojected;
  Compute* unprojected;
  // Rows of the results, or null.
  Storage* grad_hidden_probe;
  Compute* grad_cell_probe;
  // [gate][unit] of z; of a and of r, which are z's own where that norm is off.
  Compute* grad_gates;
  Compute* grad_recurrent;
  Compute* grad_input_gates;
  Compute* cell_terms;  // layer norm: [gradient of N_c's result, the same times its normalised input][unit]
};

// One vector of units of a cell, on its way back.
template <class Compute>
struct CellTrace {
  Gates<Vector<Compute>> gates;
  Vector<Compute> previous_cell, update, cell_mask;
  Vector<Compute> candidate;
  Vector<Compute> normalised;       // (candidate - mean) / deviation
  Vector<Compute> grad_normalised;  // of tanh's argument
  Vector<Compute> grad_output_gate;
  Vector<Compute> grad_candidate;      // zoneout's part; tanh's comes through N_c
  Vector<Compute> grad_previous_cell;  // zoneout's part
};

// A weight's gradient while it is accumulated over the chunks: [group][gate][unit][column], in scratch or, where the
// result has the compute type and whole vectors a row, in the result itself. W_hr has one part where others have four
// gates, of P rows.
template <class Compute>
struct AccumulatedWeight {
  Compute* values = nullptr;
  int64_t row_stride = 0;
  int64_t gate_stride = 0;
  int gates = 4;
  bool in_place = false;

  Compute* gate(int gate, int64_t group) const { return values + (group * gates + gate) * gate_stride; }
};

template <class Storage>
struct BackwardContext {
  using Compute = ComputeOf<Storage>;
  using V = Vector<Compute>;
  static constexpr int width = kWidth<Compute>;
  static constexpr int panel_width = width * kTileVectors;

  const BackwardParams& params;
  Plan<Storage> plan;
  MaskTables<Storage> masks;
  NormTables<Storage> norm;
  Barrier barrier;
  bool rebuilds;  // the gates were not kept
  bool wants_weight_ih, wants_weight_hh, wants_weight_hr, wants_input, wants_bias;

  Compute* packed_ih = nullptr;  // column panels; null: the weight is read where it stands
  Compute* packed_hh = nullptr;
  Compute* packed_hr = nullptr;
  Compute* packed_gates_ih = nullptr;  // gate panels, to rebuild with
  Compute* packed_gates_hh = nullptr;
  Compute* bias = nullptr;
  Compute* inputs = nullptr;        // the chunk's x
  Compute* hidden_rows = nullptr;   // the chunk's h_{s-1}
  Compute* input_panels = nullptr;  // the same as right sides of the weights' gradients
  Compute* hidden_panels = nullptr;
  Compute* rebuilt_gates = nullptr;
  Compute* rebuilt_input_gates = nullptr;
  Compute* grad_gates = nullptr;
  Compute* grad_recurrent = nullptr;
  Compute* grad_input_gates = nullptr;
  Compute* cell_terms = nullptr;
  Compute* grad_hidden_state = nullptr;
  Compute* grad_cell_state = nullptr;
  Compute* grad_direct = nullptr;
  Compute* grad_projected = nullptr;      // the chunk's dh_candidate: [pair][padded_projected]
  Compute* grad_unprojected = nullptr;    // one step's du: [rank][padded_hidden]
  Compute* unprojected = nullptr;         // the chunk's u: [pair][padded_hidden]
  Compute* unprojected_panels = nullptr;  // the same as the right side of W_hr's gradient
  AccumulatedWeight<Compute> gradient_ih, gradient_hh, gradient_hr;
  Compute* gradient_bias = nullptr;  // [group][gate][padded unit], and so the norms'
  Compute* gradient_input_gain = nullptr;
  Compute* gradient_recurrent_gain = nullptr;
  Compute* gradient_cell_gain = nullptr;
  Compute* gradient_cell_shift = nullptr;
  Compute* worker_room = nullptr;
  int64_t worker_room_size = 0;
  GradientRow<Storage>* worker_rows = nullptr;

  BackwardContext(const BackwardParams& given, int threads) : params(given), plan(given.in, threads) {
    rebuilds = plan.in.options.save == Save::Recompute;
    wants_weight_ih = given.grad_weight_ih != nullptr;
    wants_weight_hh = given.grad_weight_hh != nullptr;
    wants_weight_hr = given.grad_weight_hr != nullptr;
    wants_input = given.grad_input != nullptr;
    wants_bias = given.grad_bias != nullptr || given.grad_norm_input_bias != nullptr ||
                 given.grad_norm_recurrent_bias != nullptr;
    const int64_t pack_room = (width + 2) * rounded_up(larger(larger(plan.I, plan.H), plan.P), panel_width);
    const int64_t turned = room_for_turned_tiles<Compute>(plan.steps_per_chunk * plan.rows_of_group());
    const int64_t trace = static_cast<int64_t>(sizeof(CellTrace<Compute>) / sizeof(Compute));
    const int64_t norm_room = plan.in.options.norm == NormKind::Batch   ? plan.B * trace
                              : plan.in.options.norm == NormKind::Layer ? plan.padded_hidden / width * trace
                                                                        : 0;
    worker_room_size =
        rounded_up(larger(larger(larger(pack_room, turned), norm_room), 4 * plan.padded_hidden), kWidth<float>);
  }

  int input_copies() const { return plan.untied_input ? 4 : 1; }
  int hidden_copies() const { return plan.untied_hidden ? 4 : 1; }

  void take(Arena& arena) {
    plan.take_tables(arena);
    masks.take(plan, arena);
    norm.take(plan, arena);
    const int64_t gates = 4 * plan.padded_hidden, chunk = plan.largest_chunk;
    if (!reads_in_place(plan.P) || plan.weight_dropout.drawn) {
      packed_hh = arena.take<Compute>((plan.padded_projected + plan.asked * panel_width) * gates);
    }
    if (plan.projected) take_projection(arena);
    if (wants_input && !reads_in_place(plan.I))
      packed_ih = arena.take<Compute>(rounded_up(plan.I, panel_width) * gates);
    bias = arena.take<Compute>(gates);
    if (rebuilds) {
      packed_gates_ih = arena.take<Compute>(gates * plan.I);
      packed_gates_hh = arena.take<Compute>(gates * plan.P);
      rebuilt_gates = arena.take<Compute>(chunk * plan.gate_stride);
      if (plan.has_norm) rebuilt_input_gates = arena.take<Compute>(chunk * plan.gate_stride);
    }
    if (rebuilds || wants_weight_ih) inputs = arena.take<Compute>(chunk * plan.input_stride * input_copies());
    if (rebuilds || wants_weight_hh) hidden_rows = arena.take<Compute>(chunk * plan.projected_stride * hidden_copies());
    if (wants_weight_ih) {
      input_panels = arena.take<Compute>(chunk * rounded_up(plan.I, panel_width) * input_copies());
      take_gradient(arena, params.grad_weight_ih, plan.H, plan.I, false, gradient_ih);
    }
    if (wants_weight_hh) {
      hidden_panels = arena.take<Compute>(chunk * rounded_up(plan.P, panel_width) * hidden_copies());
      take_gradient(arena, params.grad_weight_hh, plan.H, plan.P, plan.weight_dropout.drawn, gradient_hh);
    }
    grad_gates = arena.take<Compute>(chunk * plan.gate_stride);
    grad_recurrent = plan.in.options.norm_recurrent ? arena.take<Compute>(chunk * plan.gate_stride) : grad_gates;
    grad_input_gates = plan.in.options.norm_input ? arena.take<Compute>(chunk * plan.gate_stride) : grad_gates;
    if (plan.in.options.norm == NormKind::Layer) cell_terms = arena.take<Compute>(chunk * 2 * plan.padded_hidden);
    grad_hidden_state = arena.take<Compute>(plan.B * plan.projected_stride);
    grad_cell_state = arena.take<Compute>(plan.B * plan.hidden_stride);
    if (plan.zones_hidden()) grad_direct = arena.take<Compute>(plan.B * plan.projected_stride);
    gradient_bias = arena.take<Compute>(plan.groups * gates);
    if (plan.has_norm) {
      gradient_input_gain = arena.take<Compute>(plan.groups * gates);
      gradient_recurrent_gain = arena.take<Compute>(plan.groups * gates);
      gradient_cell_gain = arena.take<Compute>(plan.groups * plan.padded_hidden);
      gradient_cell_shift = arena.take<Compute>(plan.groups * plan.padded_hidden);
    }
    worker_room = arena.take<Compute>(worker_room_size * plan.asked);
    worker_rows = arena.take<GradientRow<Storage>>(plan.B * plan.asked);
  }

  void take_projection(Arena& arena) {
    const int64_t chunk = plan.largest_chunk;
    if (!reads_in_place(plan.H)) {
      packed_hr = arena.take<Compute>((plan.padded_hidden + plan.asked * panel_width) * plan.P);
    }
    grad_projected = arena.take<Compute>(chunk * plan.projected_stride);
    grad_unprojected = arena.take<Compute>(plan.B * plan.hidden_stride);
    if (!wants_weight_hr) return;
    unprojected = arena.take<Compute>(chunk * plan.hidden_stride);
    unprojected_panels = arena.take<Compute>(chunk * rounded_up(plan.H, panel_width));
    gradient_hr.gates = 1;
    take_gradient(arena, params.grad_weight_hr, plan.P, plan.H, false, gradient_hr);
  }

  bool whole_vectors(int64_t columns) const { return sizeof(Storage) == sizeof(Compute) && columns % width == 0; }
  // Whether a weight (4H, columns) can serve as the right side of dz W without being packed, and it pays.
  bool reads_in_place(int64_t columns) const {
    return plan.few_pairs && whole_vectors(columns) && whole_vectors(plan.H);
  }

  // `rows`: of each gate.
  void take_gradient(Arena& arena, void* result, int64_t rows, int64_t columns, bool masked,
                     AccumulatedWeight<Compute>& gradient) const {
    gradient.in_place = whole_vectors(columns) && !masked;
    gradient.row_stride = gradient.in_place ? columns : rounded_up(columns, width) + width;
    gradient.gate_stride = gradient.row_stride * (gradient.in_place ? rows : rounded_up(rows, width));
    gradient.values = gradient.in_place ? static_cast<Compute*>(result)
                                        : arena.take<Compute>(plan.groups * gradient.gates * gradient.gate_stride);
  }

  // The panels of W_hh that a worker multiplies with: one set for all, or a set of its own units.
  Compute* packed_hidden_panels(const Share& share) const {
    if (plan.division == Division::Rows) return packed_hh;
    return packed_hh + (share.first_projected + share.worker * panel_width) * 4 * plan.padded_hidden;
  }
  ColumnPanels<Compute> hidden_column_panels(const Share& share) const {
    return column_panels(packed_hh == nullptr ? nullptr : packed_hidden_panels(share), 4 * plan.padded_hidden,
                         plan.in.weight_hh, plan.P, share.first_projected);
  }
  ColumnPanels<Compute> input_column_panels() const {
    return column_panels(packed_ih, 4 * plan.padded_hidden, plan.in.weight_ih, plan.I, 0);
  }
  // The same of W_hr, whose columns are units of u.
  Compute* packed_projection_panels(const Share& share) const {
    if (plan.division == Division::Rows) return packed_hr;
    return packed_hr + (share.first_unit + share.worker * panel_width) * plan.P;
  }
  ColumnPanels<Compute> projection_column_panels(const Share& share) const {
    return column_panels(packed_hr == nullptr ? nullptr : packed_projection_panels(share), plan.P, plan.in.weight_hr,
                         plan.H, share.first_unit);
  }
  ColumnPanels<Compute> column_panels(const Compute* packed, int64_t depth, const void* weight, int64_t columns,
                                      int64_t first_column) const {
    if (packed != nullptr) return {packed, depth * panel_width, panel_width};
    return {static_cast<const Compute*>(weight) + first_column, panel_width, columns};
  }

  Compute* room_of(const Share& share) const { return worker_room + worker_room_size * share.worker; }
  int units_at(int64_t unit) const { return static_cast<int>(smaller(width, plan.H - unit)); }

  // One vector of what the forward kept of one gate: activated, or raw where there is a norm.
  FUSEDREG_METHOD V kept(const GradientRow<Storage>& row, int gate, int64_t unit) const {
    if (row.rebuilt_gates != nullptr) return load<Compute>(row.rebuilt_gates + gate * plan.padded_hidden + unit);
    const char* from = row.saved_gates + (gate * plan.H + unit) * kept_bytes<Storage>(plan.has_norm);
    if (plan.has_norm) return kept_raw<Storage>(from, units_at(unit));
    return kept_activation<Storage>(from, gate == 2, units_at(unit));
  }
  FUSEDREG_METHOD V kept_input(const GradientRow<Storage>& row, int gate, int64_t unit) const {
    if (row.rebuilt_input_gates != nullptr) {
      return load<Compute>(row.rebuilt_input_gates + gate * plan.padded_hidden + unit);
    }
    return kept_raw<Storage>(row.saved_input_gates + (gate * plan.H + unit) * kept_bytes<Storage>(true),
                             units_at(unit));
  }

  // Asks for what enter_cell will read: where rows are taken one below the other, the processor cannot guess.
  FUSEDREG_METHOD void prefetch(const GradientRow<Storage>& row, int64_t unit) const {
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t at = (gate * plan.H + unit) * kept_bytes<Storage>(plan.has_norm);
      if (row.saved_gates != nullptr) __builtin_prefetch(row.saved_gates + at);
      if (row.saved_input_gates != nullptr) __builtin_prefetch(row.saved_input_gates + at);
      __builtin_prefetch(row.grad_gates + gate * plan.padded_hidden + unit, 1);
    }
    if (row.previous_cell != nullptr) __builtin_prefetch(row.previous_cell + unit);
    if (row.grad_output != nullptr && !plan.projected) __builtin_prefetch(row.grad_output + unit);
  }

  // From what reaches h_s and y, through zoneout, to the gradient of h_candidate.
  FUSEDREG_METHOD V enter_hidden(const GradientRow<Storage>& row, int64_t unit, const StepMasks<Compute>& step) const {
    const int count = static_cast<int>(smaller(width, plan.P - unit));
    V grad_hidden = load<Compute>(row.grad_hidden_state + unit);
    V grad_candidate{};
    if (row.grad_output != nullptr) {
      const V grad = load_some(row.grad_output + unit, count) * step.output;
      (plan.in.options.zoneout_candidate ? grad_candidate : grad_hidden) += grad;
    }
    if (row.grad_hidden_probe != nullptr) store_some(row.grad_hidden_probe + unit, grad_hidden, count);
    if (plan.zones_hidden()) {
      store<Compute>(row.grad_direct + unit, step.zone_hidden * grad_hidden);
      grad_hidden *= 1 - step.zone_hidden;
    }
    return grad_candidate + grad_hidden;
  }

  // From the gates and what reaches h_s, c_s and y, through zoneout, to the edge of N_c: the first half on the way
  // back.
  FUSEDREG_METHOD CellTrace<Compute> enter_cell(const GradientRow<Storage>& row, int64_t unit,
                                                const Gates<V>& gates) const {
    const int count = units_at(unit);
    CellTrace<Compute> trace;
    trace.gates = gates;
    trace.previous_cell = row.previous_cell == nullptr ? V{} : load_some(row.previous_cell + unit, count);
    const StepMasks<Compute> step = step_masks(plan, masks, row.rank, row.t, unit);
    trace.update = step.update;
    trace.cell_mask = step.cell;
    trace.candidate = candidate_cell(gates, trace.previous_cell, step.update, step.cell);
    V grad_cell = load<Compute>(row.grad_cell_state + unit);
    if (row.grad_cell != nullptr) grad_cell += load_some(row.grad_cell + unit, count);
    if (row.grad_cell_probe != nullptr) store_some(row.grad_cell_probe + unit, grad_cell, count);
    // Of o tanh(argument) still; leave_output makes it tanh's.
    trace.grad_normalised = plan.projected ? load<Compute>(row.grad_unprojected + unit) : enter_hidden(row, unit, step);
    trace.grad_previous_cell = V{};
    if (plan.zones_cell()) {
      trace.grad_previous_cell = step.zone_cell * grad_cell;
      grad_cell *= 1 - step.zone_cell;
    }
    trace.grad_candidate = grad_cell;
    return trace;
  }

  // Through o tanh(argument), which is h_candidate, or what is projected to it.
  FUSEDREG_METHOD void leave_output(const GradientRow<Storage>& row, int64_t unit, CellTrace<Compute>& trace,
                                    V argument) const {
    const V grad = trace.grad_normalised;
    const V squashed = tanh(argument);
    if (row.unprojected != nullptr) store<Compute>(row.unprojected + unit, trace.gates.o * squashed);
    trace.grad_output_gate = grad * squashed;
    trace.grad_normalised = grad * trace.gates.o * (1 - squashed * squashed);
  }

  // The second half: from the candidate cell to the pre-activations and c_{s-1}. `through_norm` is what came through
  // tanh and N_c. Returns dz.
  FUSEDREG_METHOD Gates<V> leave_cell(const GradientRow<Storage>& row, int64_t unit, const CellTrace<Compute>& trace,
                                      V through_norm) const {
    const CellGradients<V> gradients =
        candidate_cell_backward(trace.gates, trace.previous_cell, trace.update, trace.cell_mask,
                                trace.grad_candidate + through_norm, trace.grad_output_gate);
    if (row.grad_cell_probe != nullptr) {
      const int count = units_at(unit);
      store_some(row.grad_cell_probe + unit, load_some(row.grad_cell_probe + unit, count) + through_norm, count);
    }
    const V previous = gradients.previous_cell + trace.grad_previous_cell;
    store<Compute>(row.grad_cell_state + unit, row.reset ? V{} : previous);
    const int64_t padded = plan.padded_hidden;
    store<Compute>(row.grad_gates + unit, gradients.pre_activations.i);
    store<Compute>(row.grad_gates + padded + unit, gradients.pre_activations.f);
    store<Compute>(row.grad_gates + 2 * padded + unit, gradients.pre_activations.g);
    store<Compute>(row.grad_gates + 3 * padded + unit, gradients.pre_activations.o);
    return gradients.pre_activations;
  }
};

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
