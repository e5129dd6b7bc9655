// The cells of a block of the persistent backward at one step: what reaches them -> dz -> da, and dh, dc as they are
// carried on to the step before.
//
// Through a norm y = gain x_hat, x_hat = (x - mean) / deviation, of n values (batch norm: a column's over the rows;
// layer norm: a row's):
//
//   dx = (v - mean(v) - x_hat mean(v x_hat)) / deviation,   v = gain dy
//
// and without the two means where the statistics were constants. So each norm needs all of v before any of dx: cells
// wait in shared memory, in `trace`, for the sums.
#pragma once

#include "backward_sums.cuh"
#include "cell_step.cuh"
#include "moments.cuh"
#include "packed_masks.cuh"
#include "persistent_backward_shape.h"
#include "resident_product.cuh"

namespace fusedreg::cuda {

template <class Mode, int NT>
class BackwardCells {
  using Storage = typename Mode::Storage;
  static constexpr int kUnits = NT * 8;
  using Sums = BackwardSums<kUnits>;

  // One (row, unit) of the block at step s.
  struct Cell {
    int index;  // in [row][unit]
    int row;    // of the tile
    int column;
    int b, unit;
    int length;
    bool exists;  // in the batch and in the layer
    bool runs;    // and the row takes part in the step
    int64_t at;   // t * B + b
  };

  // Values of a cell that waits for the sums of N_c. While it waits for those of N_a, the first four are v.
  enum TraceValue { kGateI, kGateF, kGateG, kGateO, kGradOutputGate, kGradCandidate, kWeighted, kNormalised };

 public:
  const BackwardLoop& loop;
  const LayerInputs& in;

  FUSEDREG_DEVICE BackwardCells(const PersistentBackwardParams& params, int own_block)
      : loop(params.loop),
        in(params.loop.layer.in),
        params_(params),
        shape_(params.shape),
        masks_(params.masks),
        sums_(params),
        key_(mask_key(params.loop.layer.seed, params.masks.layer_direction)),
        first_row_(block_index() / params.shape.blocks * params.shape.rows),
        first_unit_(own_block * kUnits) {}

  FUSEDREG_DEVICE int first_unit() const { return first_unit_; }

  // Before anything else.
  FUSEDREG_DEVICE void set_up() {
    for (int row = thread_index(); row < shape_.rows; row += block_threads()) {
      lengths()[row] = first_row_ + row < in.rows ? static_cast<int>(row_length(in, first_row_ + row)) : 0;
    }
    set_up_constants();
    sync_block();
    Storage* const staged = params_.shared<Storage>(params_.room.staged);
    const Storage* const grad_hidden = static_cast<const Storage*>(loop.grad_final_hidden);
    const float* const grad_cell = static_cast<const float*>(loop.grad_final_cell);
    for_each_cell(0, shape_.rows, 0, [&](const Cell& cell) {
      if (cell.row >= shape_.rows) return;
      // Zeros where there is no cell; where there is one, until its row's last step.
      for (int gate = 0; gate < 4; ++gate) staged[staged_index(cell, gate)] = Storage{};
      const int64_t at = int64_t{cell.b} * in.hidden_size + cell.unit;
      hidden_of(cell) = cell.exists && grad_hidden != nullptr ? widen(grad_hidden[at]) : 0.0f;
      cell_of(cell) = cell.exists && grad_cell != nullptr ? grad_cell[at] : 0.0f;
      bits_of(cell) = static_cast<uint16_t>(cell.exists ? packed_sequence_masks(masks_, key_, cell.b, cell.unit) : 0u);
    });
  }

  // The steps that some row of the tile takes part in.
  FUSEDREG_DEVICE int longest() const {
    int longest = 0;
    for (int row = 0; row < shape_.rows; ++row) longest = lengths()[row] > longest ? lengths()[row] : longest;
    return longest;
  }

  // A step that no row takes part in.
  FUSEDREG_DEVICE void pass_step(int s) const {
    for_each_cell(0, shape_.rows, s, [&](const Cell& cell) {
      if (cell.exists) write_padding(cell);
    });
  }

  // What step s needs and no other block has a say in. s = -1: nothing but the shift of what the step after needs on.
  FUSEDREG_DEVICE void prepare(int s) {
    // Opaque: the ten rounds' keys are to be computed here, not kept from step to step.
    const MaskKey key{static_cast<uint32_t>(opaque(static_cast<int>(key_.low))),
                      static_cast<uint32_t>(opaque(static_cast<int>(key_.high))), key_.layer_direction};
    for_each_cell(0, shape_.rows, s, [&](const Cell& cell) {
      if (!cell.exists) return;
      const uint32_t before = bits_of(cell);
      uint32_t bits = before & kSequenceBits;
      if ((before & kBeginsFromZero) != 0) bits |= kNextBeginsFromZero;
      if (cell.runs && s >= 0) {
        bits |= packed_step_masks(masks_, key, cell.b, cell.unit, position(in, cell.length, s));
        if (begins_from_zero(in, cell.b, cell.length, s)) bits |= kBeginsFromZero;
      }
      bits_of(cell) = static_cast<uint16_t>(bits);
    });
    if (s >= 0) prepare_moments(s);
  }

  // Steps 1 and 2 of persistent_backward.cuh: leaves da in `staged` and in the results, and zoneout's and the forget
  // gate's shares in dh and dc.
  FUSEDREG_DEVICE void step(int s, Exchange& exchange) {
    float over_rows[8] = {}, cell_means[2] = {};  // batch norm: of this thread's unit
    if (shape_.norm_cell) {
      for_each_cell(0, shape_.rows, s, [&](const Cell& cell) {
        float terms[2] = {};
        if (cell.runs) {
          wait_for_cell_norm(cell, s, terms);
        } else if (cell.exists) {
          write_padding(cell);
        }
        sums_.collect(over_rows, terms, cell.row);
      });
      sums_.template finish<2>(over_rows, exchange);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        cell_means[k] = over_rows[k];
        over_rows[k] = 0;
      }
    }
    for_each_cell(0, shape_.rows, s, [&](const Cell& cell) {
      float terms[8] = {};
      if (cell.runs) {
        leave(cell, s, cell_means, terms);
      } else if (cell.exists && !shape_.norm_cell) {
        write_padding(cell);
      }
      if (shape_.norm_recurrent) sums_.collect(over_rows, terms, cell.row);
    });
    if (!shape_.norm_recurrent) return;
    sums_.template finish<8>(over_rows, exchange);
    for_each_cell(0, shape_.rows, s, [&](const Cell& cell) {
      if (cell.runs) leave_recurrent_norm(cell, over_rows);
    });
  }

  // Adds m_h (da W_hh) of step s to dh, after prepare(s - 1). partial(row, column, warp) is one warp's share of the
  // product: warps 2k and 2k + 1 have gate k's.
  template <class Partial>
  FUSEDREG_DEVICE void add_recurrent(int s, int first, int last, const Partial& partial) {
    for_each_cell(first, last < shape_.rows ? last : shape_.rows, s, [&](const Cell& cell) {
      const uint32_t bits = bits_of(cell);
      if (!cell.runs || (bits & kNextBeginsFromZero) != 0) return;
      float sum = 0;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        sum += unpacked_hidden_mask(masks_, bits, gate) *
               (partial(cell.row, cell.column, 2 * gate) + partial(cell.row, cell.column, 2 * gate + 1));
      }
      hidden_of(cell) += masks_.recurrent_scale * sum;
    });
  }

  FUSEDREG_DEVICE void write_initial() const {
    for_each_cell(0, shape_.rows, 0, [&](const Cell& cell) {
      if (!cell.exists) return;
      const int64_t at = int64_t{cell.b} * in.hidden_size + cell.unit;
      if (loop.grad_initial_hidden != nullptr) {
        static_cast<Storage*>(loop.grad_initial_hidden)[at] = narrow<Storage>(hidden_of(cell));
      }
      if (loop.grad_initial_cell != nullptr) static_cast<float*>(loop.grad_initial_cell)[at] = cell_of(cell);
    });
  }

 private:
  // Cells of rows first ... last - 1, thread by thread; `first` is a multiple of kTileRows. Whole warps come along,
  // beyond the last row too.
  template <class Visit>
  FUSEDREG_DEVICE void for_each_cell(int first, int last, int s, const Visit& visit) const {
    const int begin = first * kUnits, end = (last * kUnits + 31) / 32 * 32;
    // Opaque: nothing of a cell is to be kept from step to step in registers that the product could use.
    const int own = opaque(thread_index());
#pragma unroll 1
    for (int i = begin + ((own - begin) & (kProductThreads - 1)); i < end; i += kProductThreads) {
      Cell cell;
      cell.index = i;
      cell.row = i / kUnits;
      cell.column = i % kUnits;
      cell.b = first_row_ + cell.row;
      cell.unit = first_unit_ + cell.column;
      cell.exists = cell.row < last && cell.b < in.rows && cell.unit < in.hidden_size;
      cell.length = cell.exists ? lengths()[cell.row] : 0;
      cell.runs = s < cell.length;
      cell.at = position(in, cell.length, s) * in.rows + cell.b;
      visit(cell);
    }
  }

  // What stands in shared memory.
  FUSEDREG_DEVICE int* lengths() const { return params_.shared<int>(params_.room.lengths); }
  FUSEDREG_DEVICE float* gate_constants() const { return params_.shared<float>(params_.room.gate_constants); }
  FUSEDREG_DEVICE float* cell_constants() const { return params_.shared<float>(params_.room.cell_constants); }
  FUSEDREG_DEVICE float* gate_moments() const { return params_.shared<float>(params_.room.gate_moments); }
  FUSEDREG_DEVICE float* cell_moments() const { return params_.shared<float>(params_.room.cell_moments); }
  FUSEDREG_DEVICE float& hidden_of(const Cell& cell) const {
    return params_.shared<float>(params_.room.hidden)[cell.index];
  }
  FUSEDREG_DEVICE float& cell_of(const Cell& cell) const {
    return params_.shared<float>(params_.room.cell)[cell.index];
  }
  FUSEDREG_DEVICE uint16_t& bits_of(const Cell& cell) const {
    return params_.shared<uint16_t>(params_.room.masks)[cell.index];
  }
  FUSEDREG_DEVICE int staged_index(const Cell& cell, int gate) const {
    return (cell.row * 4 + gate) * kUnits + cell.column;
  }
  FUSEDREG_DEVICE float& traced(const Cell& cell, int value) const {
    return params_.shared<float>(params_.room.trace)[value * shape_.rows * kUnits + cell.index];
  }

  FUSEDREG_DEVICE void set_up_constants() {
    const int64_t H = in.hidden_size;
    const NormParameters& norm = in.norm;
    for (int i = thread_index(); i < 4 * kUnits; i += block_threads()) {
      const int unit = first_unit_ + i % kUnits;
      const int64_t column = i / kUnits * H + unit;
      const bool exists = unit < H;
      gate_constants()[i] = exists ? static_cast<const float*>(loop.layer.bias)[column] : 0.0f;
      gate_constants()[4 * kUnits + i] = exists ? norm_parameter<Storage>(norm.recurrent_weight, column, 1.0f) : 0.0f;
      if (shape_.norm_cell && i < kUnits) {
        cell_constants()[i] = exists ? norm_parameter<Storage>(norm.cell_weight, unit, 1.0f) : 0.0f;
        cell_constants()[kUnits + i] = exists ? norm_parameter<Storage>(norm.cell_bias, unit, 0.0f) : 0.0f;
      }
    }
  }

  // ---- a norm's means and scales at the prepared step ----

  struct Normaliser {
    float mean, scale, spread;
    FUSEDREG_DEVICE float normalised(float value) const { return (value - mean) * spread; }
  };

  FUSEDREG_DEVICE int gate_places() const { return shape_.norm == NormKind::Batch ? 4 * kUnits : shape_.rows; }
  FUSEDREG_DEVICE int cell_places() const { return shape_.norm == NormKind::Batch ? kUnits : shape_.rows; }
  static FUSEDREG_DEVICE Normaliser normaliser(const float* moments, int places, int place) {
    return {moments[place], moments[places + place], moments[2 * places + place]};
  }
  FUSEDREG_DEVICE Normaliser gate_normaliser(const Cell& cell, int gate) const {
    const int place = shape_.norm == NormKind::Batch ? gate * kUnits + cell.column : cell.row;
    return normaliser(gate_moments(), gate_places(), place);
  }
  FUSEDREG_DEVICE Normaliser cell_normaliser(const Cell& cell) const {
    return normaliser(cell_moments(), cell_places(), shape_.norm == NormKind::Batch ? cell.column : cell.row);
  }
  FUSEDREG_DEVICE float gain(const Cell& cell, int gate) const {
    return gate_constants()[(4 + gate) * kUnits + cell.column];
  }

  FUSEDREG_DEVICE void keep_moments(float* to, int places, int place, const Moments<float>& moments) const {
    to[place] = moments.mean;
    to[places + place] = moments.scale(in.norm_eps);
    to[2 * places + place] = moments.spread_scale(in.norm_eps);
  }

  FUSEDREG_DEVICE void prepare_moments(int s) {
    const int64_t H = in.hidden_size;
    if (shape_.norm == NormKind::Batch) {
      int count = 0;
      for (int row = 0; row < shape_.rows; ++row) count += s < lengths()[row] ? 1 : 0;
      const bool constant = !takes_batch_statistics(in.options, count);
      sums_.set_count(constant ? 0 : count);
      for (int i = thread_index(); i < 4 * kUnits; i += block_threads()) {
        const int unit = first_unit_ + i % kUnits;
        if (unit >= H) continue;
        if (shape_.norm_recurrent) {
          keep_moments(gate_moments(), 4 * kUnits, i,
                       load_moments<float>(loop.saved.recurrent_statistics, s, 4 * H, i / kUnits * H + unit, constant));
        }
        if (shape_.norm_cell && i < kUnits) {
          keep_moments(cell_moments(), kUnits, i,
                       load_moments<float>(loop.saved.cell_statistics, s, H, unit, constant));
        }
      }
    } else if (shape_.norm == NormKind::Layer) {
      for (int row = thread_index(); row < shape_.rows; row += block_threads()) {
        const int64_t length = lengths()[row], t = position(in, length, s), b = first_row_ + row;
        if (s >= length) continue;
        if (shape_.norm_recurrent) {
          keep_moments(gate_moments(), shape_.rows, row,
                       load_moments<float>(loop.saved.recurrent_statistics, t, in.rows, b, false));
        }
        if (shape_.norm_cell) {
          keep_moments(cell_moments(), shape_.rows, row,
                       load_moments<float>(loop.saved.cell_statistics, t, in.rows, b, false));
        }
      }
    }
  }

  // ---- one cell ----

  FUSEDREG_DEVICE Gates<float> gates_of(const Cell& cell) const {
    const int64_t H = in.hidden_size;
    if (loop.activated) return read_activated_gates<Storage>(loop.gates, cell.at, H, cell.unit);
    float a[4], terms[4], z[4];
    read_gates(static_cast<const float*>(loop.gates), cell.at, H, cell.unit, a);
    read_gates(static_cast<const float*>(loop.layer.input_terms), cell.at, H, cell.unit, terms);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      if (shape_.norm_recurrent) a[gate] = gate_normaliser(cell, gate).normalised(a[gate]) * gain(cell, gate);
      z[gate] = a[gate] + (terms[gate] + gate_constants()[gate * kUnits + cell.column]);
    }
    return activated(z);
  }

  FUSEDREG_DEVICE float previous_cell(const Cell& cell, int s) const {
    const int64_t H = in.hidden_size;
    if ((bits_of(cell) & kBeginsFromZero) != 0) return 0;
    if (s > 0) {
      const int64_t at = position(in, cell.length, s - 1) * in.rows + cell.b;
      return static_cast<const float*>(loop.saved.cells)[at * H + cell.unit];
    }
    return in.initial_cell == nullptr ? 0.0f : static_cast<const float*>(in.initial_cell)[cell.b * H + cell.unit];
  }

  FUSEDREG_DEVICE CellTrace<float> enter(const Cell& cell, int s) const {
    const int64_t H = in.hidden_size, at = cell.at * H + cell.unit;
    CellIncoming<float> incoming{0, hidden_of(cell), cell_of(cell)};
    if (loop.grad_output != nullptr) {
      const int64_t t = cell.at / in.rows;
      incoming.output = widen(static_cast<const Storage*>(
          loop.grad_output)[t * loop.grad_output_step_stride + cell.b * loop.grad_output_row_stride + cell.unit]);
    }
    if (loop.grad_cells != nullptr) incoming.cell += static_cast<const float*>(loop.grad_cells)[at];
    return enter_cell(in.options, unpacked_step_masks(masks_, bits_of(cell)), gates_of(cell), previous_cell(cell, s),
                      incoming);
  }

  // To the edge of N_c: leaves what leave() picks up again, and the terms of N_c's sums.
  FUSEDREG_DEVICE void wait_for_cell_norm(const Cell& cell, int s, float (&terms)[2]) {
    CellTrace<float> trace = enter(cell, s);
    const float normalised = cell_normaliser(cell).normalised(trace.candidate);
    const float gain = cell_constants()[cell.column], shift = cell_constants()[kUnits + cell.column];
    const float grad = leave_output(trace, normalised * gain + shift);
    const int64_t at = cell.at * in.hidden_size + cell.unit;
    static_cast<float*>(loop.grad_cell_normalised)[at] = grad;
    static_cast<float*>(loop.cell_normalised)[at] = normalised;
    terms[0] = rounded_product(grad, gain);
    terms[1] = terms[0] * normalised;
    traced(cell, kGateI) = trace.gates.i;
    traced(cell, kGateF) = trace.gates.f;
    traced(cell, kGateG) = trace.gates.g;
    traced(cell, kGateO) = trace.gates.o;
    traced(cell, kGradOutputGate) = trace.grad_output_gate;
    traced(cell, kGradCandidate) = trace.grad_candidate;
    traced(cell, kWeighted) = terms[0];
    traced(cell, kNormalised) = normalised;
    hidden_of(cell) = trace.grad_previous_hidden;
    cell_of(cell) = trace.grad_previous_cell;
  }

  FUSEDREG_DEVICE CellTrace<float> resumed(const Cell& cell, int s) const {
    const StepMasks<float> masks = unpacked_step_masks(masks_, bits_of(cell));
    CellTrace<float> trace{};
    trace.gates = {traced(cell, kGateI), traced(cell, kGateF), traced(cell, kGateG), traced(cell, kGateO)};
    trace.previous_cell = previous_cell(cell, s);
    trace.update = masks.update;
    trace.cell_mask = masks.cell;
    trace.grad_output_gate = traced(cell, kGradOutputGate);
    trace.grad_candidate = traced(cell, kGradCandidate);
    trace.grad_previous_cell = cell_of(cell);
    trace.grad_previous_hidden = hidden_of(cell);
    return trace;
  }

  // Through the cell to dz, and to da unless N_a stands in between: then the terms of its sums.
  FUSEDREG_DEVICE void leave(const Cell& cell, int s, const float (&cell_means)[2], float (&terms)[8]) {
    CellTrace<float> trace;
    float through_output;
    if (shape_.norm_cell) {
      trace = resumed(cell, s);
      through_output =
          cell_normaliser(cell).scale * sums_.centred(cell_means[0], cell_means[1], cell.row, traced(cell, kWeighted),
                                                      traced(cell, kNormalised), in.hidden_size);
    } else {
      trace = enter(cell, s);
      through_output = leave_output(trace, trace.candidate);
    }
    const CellDeparting<float> departing = leave_cell(trace, through_output, (bits_of(cell) & kBeginsFromZero) != 0);
    cell_of(cell) = departing.previous_cell;
    hidden_of(cell) = departing.previous_hidden;
    if (loop.grad_gates != nullptr) {
      write_gates(static_cast<float*>(loop.grad_gates), cell.at, in.hidden_size, cell.unit, departing.pre_activations);
    }
    if (!shape_.norm_recurrent) return write_recurrent(cell, departing.pre_activations);
    float a[4];
    read_gates(static_cast<const float*>(loop.gates), cell.at, in.hidden_size, cell.unit, a);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      terms[gate] = rounded_product(departing.pre_activations[gate], gain(cell, gate));
      terms[4 + gate] = terms[gate] * gate_normaliser(cell, gate).normalised(a[gate]);
      traced(cell, gate) = terms[gate];
    }
  }

  FUSEDREG_DEVICE void leave_recurrent_norm(const Cell& cell, const float (&gate_means)[8]) {
    float a[4], da[4];
    read_gates(static_cast<const float*>(loop.gates), cell.at, in.hidden_size, cell.unit, a);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      const Normaliser norm = gate_normaliser(cell, gate);
      da[gate] = norm.scale * sums_.centred(gate_means[gate], gate_means[4 + gate], cell.row, traced(cell, gate),
                                            norm.normalised(a[gate]), 4 * in.hidden_size);
    }
    write_recurrent(cell, da);
  }

  FUSEDREG_DEVICE void write_recurrent(const Cell& cell, const float (&da)[4]) const {
    write_gates(static_cast<Storage*>(loop.grad_recurrent), cell.at, in.hidden_size, cell.unit, da);
    Storage* const staged = params_.shared<Storage>(params_.room.staged);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) staged[staged_index(cell, gate)] = exchanged<Mode>(da[gate]);
  }

  FUSEDREG_DEVICE void write_padding(const Cell& cell) const {
    const int64_t H = in.hidden_size, at = cell.at * H + cell.unit;
    const float zeros[4] = {};
    write_gates(static_cast<Storage*>(loop.grad_recurrent), cell.at, H, cell.unit, zeros);
    if (loop.grad_gates != nullptr) write_gates(static_cast<float*>(loop.grad_gates), cell.at, H, cell.unit, zeros);
    if (!shape_.norm_cell) return;
    static_cast<float*>(loop.grad_cell_normalised)[at] = 0;
    static_cast<float*>(loop.cell_normalised)[at] = 0;
  }

  const PersistentBackwardParams& params_;
  const BackwardShape& shape_;
  const LoopMasks<float>& masks_;
  Sums sums_;
  MaskKey key_;
  int first_row_, first_unit_;
};

}  // namespace fusedreg::cuda
