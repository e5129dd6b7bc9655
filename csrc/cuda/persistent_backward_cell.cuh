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

#include "persistent_backward_block.cuh"
#include "resident_product.cuh"

namespace fusedreg::cuda {

template <class Mode, int NT>
class BackwardCells : public BackwardBlock<typename Mode::Storage, NT * 8> {
  using Storage = typename Mode::Storage;
  static constexpr int kUnits = NT * 8;
  using Block = BackwardBlock<Storage, kUnits>;
  using Block::bits_of;
  using Block::cell_norm;
  using Block::cell_of;
  using Block::for_each_cell;
  using Block::gain;
  using Block::gate_norm;
  using Block::hidden_of;
  using Block::masks_;
  using Block::params_;
  using Block::shape_;
  using Block::traced;
  using typename Block::Cell;

  // The first four are fetched as the terms that N_a(a) is added to. They are the gates while the cell waits for the
  // sums of N_c, and v while it waits for those of N_a.
  enum TraceValue { kGateI, kGateF, kGateG, kGateO, kGradOutputGate, kGradCandidate, kWeighted, kNormalised };

 public:
  using Block::in;
  using Block::loop;

  FUSEDREG_DEVICE BackwardCells(const PersistentBackwardParams& params, int own_block)
      : Block(params, own_block), sums_(params) {}

  // A step that no row takes part in.
  FUSEDREG_DEVICE void pass_step(int s) const {
    for_each_cell(0, shape_.rows, s, [&](const Cell& cell) {
      if (cell.exists) write_padding(cell);
    });
  }

  // Steps 1 and 2 of persistent_backward.cuh, after prepare(s): leaves da in `staged`, and zoneout's and the forget
  // gate's shares in dh and dc.
  FUSEDREG_DEVICE void step(int s, Exchange& exchange) {
    float over_rows[8] = {}, cell_means[2] = {};  // batch norm: of this thread's unit
    if (shape_.norm_cell) {
      for_each_cell(0, shape_.rows, s, [&](const Cell& cell) {
        float terms[2] = {};
        if (cell.runs) {
          wait_for_cell_norm(cell, terms);
        } else if (cell.exists) {
          write_padding(cell);
        }
        sums_.collect(over_rows, terms, cell.row);
      });
      sums_.template finish<2>(over_rows, this->count_, exchange);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        cell_means[k] = over_rows[k];
        over_rows[k] = 0;
      }
    }
    for_each_cell(0, shape_.rows, s, [&](const Cell& cell) {
      float terms[8] = {};
      if (cell.runs) {
        leave(cell, cell_means, terms);
      } else if (cell.exists && !shape_.norm_cell) {
        write_padding(cell);
      }
      if (shape_.norm_recurrent) sums_.collect(over_rows, terms, cell.row);
    });
    if (!shape_.norm_recurrent) return;
    sums_.template finish<8>(over_rows, this->count_, exchange);
    for_each_cell(0, shape_.rows, s, [&](const Cell& cell) {
      if (cell.runs) leave_recurrent_norm(cell, over_rows);
    });
  }

  // Writes da of step s, once it is published: the release of the block's flag waits for all stores before it.
  FUSEDREG_DEVICE void write_results(int s) const {
    if constexpr (kStagedIsRounded) return;
    for_each_cell(0, shape_.rows, s, [&](const Cell& cell) {
      if (!cell.runs) return;
      Storage* const to = static_cast<Storage*>(loop.grad_recurrent) + cell.at * 4 * in.hidden_size + cell.unit;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        to[gate * in.hidden_size] = staged()[this->staged_index(cell, gate)];
      }
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
      hidden_of(cell) += sum * masks_.recurrent_scale;
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
  FUSEDREG_DEVICE float raw(const Cell& cell, int gate) const {
    return Block::template of_cell<float>(params_.room.gates, cell, gate);
  }
  FUSEDREG_DEVICE float previous_cell(const Cell& cell) const {
    return Block::template of_cell<float>(params_.room.previous_cell, cell);
  }

  FUSEDREG_DEVICE Gates<float> gates_of(const Cell& cell) const {
    float z[4];
    if (shape_.activated) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        const Kept<Storage> kept = Block::template of_cell<Kept<Storage>>(params_.room.gates, cell, gate);
        z[gate] = kept_activation<Storage>(kept, gate == 2);
      }
      return {z[0], z[1], z[2], z[3]};
    }
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      float a = raw(cell, gate);
      if (shape_.norm_recurrent) a = gate_norm(cell, gate).normalised(a) * gain(cell, gate);
      z[gate] = a + (traced(cell, gate) + this->gate_constants()[gate * kUnits + cell.column]);
    }
    return activated(z);
  }

  FUSEDREG_DEVICE CellTrace<float> enter(const Cell& cell) const {
    CellIncoming<float> incoming{0, hidden_of(cell), cell_of(cell)};
    if (loop.grad_output != nullptr) {
      incoming.output = widen(Block::template of_cell<Storage>(params_.room.grad_output, cell));
    }
    if (loop.grad_cells != nullptr) incoming.cell += Block::template of_cell<float>(params_.room.grad_cells, cell);
    const StepMasks<float> masks = unpacked_step_masks(masks_, bits_of(cell));
    if (loop.grad_hidden_probe != nullptr) {
      static_cast<Storage*>(loop.grad_hidden_probe)[cell.at * in.hidden_size + cell.unit] =
          narrow<Storage>(grad_of_carried(in.options, masks, incoming));
    }
    return enter_cell(masks, gates_of(cell), previous_cell(cell), enter_hidden(in.options, masks, incoming),
                      incoming.cell);
  }

  // To the edge of N_c: leaves what leave() picks up again, and the terms of N_c's sums.
  FUSEDREG_DEVICE void wait_for_cell_norm(const Cell& cell, float (&terms)[2]) {
    CellTrace<float> trace = enter(cell);
    const float normalised = cell_norm(cell).normalised(trace.candidate);
    const float cell_gain = this->cell_constants()[cell.column], shift = this->cell_constants()[kUnits + cell.column];
    const float grad = leave_output(trace, normalised * cell_gain + shift);
    const int64_t at = cell.at * in.hidden_size + cell.unit;
    static_cast<float*>(loop.grad_cell_normalised)[at] = grad;
    static_cast<float*>(loop.cell_normalised)[at] = normalised;
    terms[0] = rounded_product(grad, cell_gain);
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

  FUSEDREG_DEVICE CellTrace<float> resumed(const Cell& cell) const {
    const StepMasks<float> masks = unpacked_step_masks(masks_, bits_of(cell));
    CellTrace<float> trace{};
    trace.gates = {traced(cell, kGateI), traced(cell, kGateF), traced(cell, kGateG), traced(cell, kGateO)};
    trace.previous_cell = previous_cell(cell);
    trace.update = masks.update;
    trace.cell_mask = masks.cell;
    trace.grad_output_gate = traced(cell, kGradOutputGate);
    trace.grad_candidate = traced(cell, kGradCandidate);
    trace.grad_previous_cell = cell_of(cell);
    trace.grad_previous_hidden = hidden_of(cell);
    return trace;
  }

  // Through the cell to dz, and to da unless N_a stands in between: then the terms of its sums.
  FUSEDREG_DEVICE void leave(const Cell& cell, const float (&cell_means)[2], float (&terms)[8]) {
    CellTrace<float> trace;
    float through_output;
    if (shape_.norm_cell) {
      trace = resumed(cell);
      through_output =
          cell_norm(cell).scale * sums_.centred(cell_means[0], cell_means[1], cell.row, traced(cell, kWeighted),
                                                traced(cell, kNormalised), in.hidden_size);
    } else {
      trace = enter(cell);
      through_output = leave_output(trace, trace.candidate);
    }
    const CellDeparting<float> departing = leave_cell(trace, through_output, (bits_of(cell) & kBeginsFromZero) != 0);
    cell_of(cell) = departing.previous_cell;
    hidden_of(cell) = departing.previous_hidden;
    if (loop.grad_cell_probe != nullptr) {
      static_cast<float*>(loop.grad_cell_probe)[cell.at * in.hidden_size + cell.unit] =
          grad_of_cell(trace, through_output);
    }
    if (loop.grad_gates != nullptr) {
      write_gates(static_cast<float*>(loop.grad_gates), cell.at, in.hidden_size, cell.unit, departing.pre_activations);
    }
    if (!shape_.norm_recurrent) return write_recurrent(cell, departing.pre_activations);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      terms[gate] = rounded_product(departing.pre_activations[gate], gain(cell, gate));
      terms[4 + gate] = terms[gate] * gate_norm(cell, gate).normalised(raw(cell, gate));
      traced(cell, gate) = terms[gate];
    }
  }

  FUSEDREG_DEVICE void leave_recurrent_norm(const Cell& cell, const float (&gate_means)[8]) {
    float da[4];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      const BackwardNorm norm = gate_norm(cell, gate);
      da[gate] = norm.scale * sums_.centred(gate_means[gate], gate_means[4 + gate], cell.row, traced(cell, gate),
                                            norm.normalised(raw(cell, gate)), 4 * in.hidden_size);
    }
    write_recurrent(cell, da);
  }

  // What is published stands in `staged` in the results' type, from where write_results() takes it; but for TF32, where
  // the results are not rounded.
  static constexpr bool kStagedIsRounded = Mode::kMatrixInstructions && sizeof(Storage) == 4;

  FUSEDREG_DEVICE void write_recurrent(const Cell& cell, const float (&da)[4]) const {
    if constexpr (kStagedIsRounded) {
      write_gates(static_cast<Storage*>(loop.grad_recurrent), cell.at, in.hidden_size, cell.unit, da);
    }
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) staged()[this->staged_index(cell, gate)] = exchanged<Mode>(da[gate]);
  }
  FUSEDREG_DEVICE Storage* staged() const { return params_.template shared<Storage>(params_.room.staged); }

  FUSEDREG_DEVICE void write_padding(const Cell& cell) const {
    const int64_t H = in.hidden_size, at = cell.at * H + cell.unit;
    const float zeros[4] = {};
    write_gates(static_cast<Storage*>(loop.grad_recurrent), cell.at, H, cell.unit, zeros);
    if (loop.grad_gates != nullptr) write_gates(static_cast<float*>(loop.grad_gates), cell.at, H, cell.unit, zeros);
    if (loop.grad_hidden_probe != nullptr) static_cast<Storage*>(loop.grad_hidden_probe)[at] = narrow<Storage>(0.0f);
    if (loop.grad_cell_probe != nullptr) static_cast<float*>(loop.grad_cell_probe)[at] = 0;
    if (!shape_.norm_cell) return;
    static_cast<float*>(loop.grad_cell_normalised)[at] = 0;
    static_cast<float*>(loop.cell_normalised)[at] = 0;
  }

  BackwardSums<kUnits> sums_;
};

}  // namespace fusedreg::cuda
