// What every step needs of one row, and the cell on one vector of its units.
#pragma once

#include "../common/cell.h"
#include "pack.h"
#include "vector_math.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

// Masks that last a sequence, rank by rank, padded; null where not active.
template <class Compute>
struct SequenceMasks {
  Compute* input = nullptr;   // [rank][1 or 4][padded_input]
  Compute* hidden = nullptr;  // [rank][1 or 4][padded_projected]
  Compute* output = nullptr;  // [rank][padded_projected]
  Compute* update = nullptr;  // [rank][padded_hidden], and so the rest
  Compute* cell = nullptr;
};

template <class Storage>
struct MaskTables : SequenceMasks<ComputeOf<Storage>> {
  using Compute = ComputeOf<Storage>;

  void take(const Plan<Storage>& plan, Arena& arena) {
    const int64_t hidden = plan.B * plan.padded_hidden, projected = plan.B * plan.padded_projected;
    if (plan.input_dropout.drawn)
      this->input = arena.take<Compute>(plan.B * plan.padded_input * (plan.untied_input ? 4 : 1));
    if (plan.hidden_dropout.drawn) this->hidden = arena.take<Compute>(projected * (plan.untied_hidden ? 4 : 1));
    if (plan.output_dropout.drawn) this->output = arena.take<Compute>(projected);
    if (plan.update_dropout.drawn && plan.in.options.update_mask_sequence) this->update = arena.take<Compute>(hidden);
    if (plan.cell_dropout.active()) this->cell = arena.take<Compute>(hidden);
  }

  // Fills the rows of every `workers`th rank.
  void fill(const Plan<Storage>& plan, int worker, int workers) const {
    for (int64_t rank = worker; rank < plan.B; rank += workers) {
      const MaskRow row = plan.mask_row(rank);
      fill_gate_masks(plan.input_dropout, plan.untied_input, kInputFamily, 0, kUntiedInputFamily, rank, row,
                      plan.padded_input, this->input);
      fill_gate_masks(plan.hidden_dropout, plan.untied_hidden, kSequenceFamily, kHiddenTied, kUntiedHiddenFamily, rank,
                      row, plan.padded_projected, this->hidden);
      fill_unit_mask(plan.output_dropout, kOutput, rank, row, plan.padded_projected, this->output);
      fill_unit_mask(plan.update_dropout, kUpdateSequence, rank, row, plan.padded_hidden, this->update);
      fill_unit_mask(plan.cell_dropout, kCell, rank, row, plan.padded_hidden, this->cell);
    }
  }

 private:
  static void fill_gate_masks(const Site<Compute>& site, bool untied, uint32_t tied_family, int tied_word,
                              uint32_t untied_family, int64_t rank, const MaskRow& row, int64_t padded,
                              Compute* table) {
    if (table == nullptr) return;
    if (!untied) return fill_sequence_mask(site, row, tied_family, tied_word, padded, table + rank * padded);
    for (int gate = 0; gate < 4; ++gate) {
      fill_sequence_mask(site, row, untied_family, gate, padded, table + (rank * 4 + gate) * padded);
    }
  }
  static void fill_unit_mask(const Site<Compute>& site, int word, int64_t rank, const MaskRow& row, int64_t padded,
                             Compute* table) {
    if (table == nullptr) return;
    fill_sequence_mask(site, row, kSequenceFamily, word, padded, table + rank * padded);
  }
};

// The masks of one vector of units at one step. Absent ones are 1 (zones: 0). With a projection the units of a cell are
// not those of h: `zone_hidden` and `output` are then hidden_step_masks' alone, the others step_masks'.
template <class Compute>
struct StepMasks {
  Vector<Compute> update, cell, zone_hidden, zone_cell, output;
};

template <class Storage>
FUSEDREG_INLINE StepMasks<ComputeOf<Storage>> step_masks(const Plan<Storage>& plan,
                                                         const SequenceMasks<ComputeOf<Storage>>& tables, int64_t rank,
                                                         int64_t t, int64_t unit) {
  using Compute = ComputeOf<Storage>;
  const int64_t at = rank * plan.padded_hidden + unit;
  StepMasks<Compute> masks;
  masks.update = tables.update != nullptr ? load<Compute>(tables.update + at) : broadcast<Compute>(1);
  masks.cell = tables.cell != nullptr ? load<Compute>(tables.cell + at) : broadcast<Compute>(1);
  masks.output =
      tables.output != nullptr && !plan.projected ? load<Compute>(tables.output + at) : broadcast<Compute>(1);
  masks.zone_hidden = broadcast<Compute>(plan.zoneout_hidden.expectation);
  masks.zone_cell = broadcast<Compute>(plan.zoneout_cell.expectation);
  if (plan.step_words) {
    const MaskRow row = plan.mask_row(rank);
    const DrawnWords<Compute> words = words_of_units<Compute>(row, unit, static_cast<uint32_t>(t) + row.first_step);
    if (plan.zoneout_hidden.drawn) masks.zone_hidden = mask_of(plan.zoneout_hidden, words.word[kZoneoutHidden]);
    if (plan.zoneout_cell.drawn) masks.zone_cell = mask_of(plan.zoneout_cell, words.word[kZoneoutCell]);
    if (plan.update_dropout.drawn && tables.update == nullptr) {
      masks.update = mask_of(plan.update_dropout, words.word[kUpdateStep]);
    }
    if (plan.dropout.drawn) masks.output *= mask_of(plan.dropout, words.word[kBetweenLayers]);
  }
  return masks;
}

// The masks of one vector of units of h, where these are not the cell's.
template <class Storage>
FUSEDREG_INLINE StepMasks<ComputeOf<Storage>> hidden_step_masks(const Plan<Storage>& plan,
                                                                const SequenceMasks<ComputeOf<Storage>>& tables,
                                                                int64_t rank, int64_t t, int64_t unit) {
  using Compute = ComputeOf<Storage>;
  StepMasks<Compute> masks{};
  masks.output = tables.output != nullptr ? load<Compute>(tables.output + rank * plan.padded_projected + unit)
                                          : broadcast<Compute>(1);
  masks.zone_hidden = broadcast<Compute>(plan.zoneout_hidden.expectation);
  if (plan.zoneout_hidden.drawn || plan.dropout.drawn) {
    const MaskRow row = plan.mask_row(rank);
    const DrawnWords<Compute> words = words_of_units<Compute>(row, unit, static_cast<uint32_t>(t) + row.first_step);
    if (plan.zoneout_hidden.drawn) masks.zone_hidden = mask_of(plan.zoneout_hidden, words.word[kZoneoutHidden]);
    if (plan.dropout.drawn) masks.output *= mask_of(plan.dropout, words.word[kBetweenLayers]);
  }
  return masks;
}

// z_i, z_f, z_g, z_o -> i, f, g, o
template <class Compute>
FUSEDREG_INLINE Gates<Vector<Compute>> activated(const Vector<Compute> (&z)[4]) {
  return {sigmoid(z[0]), sigmoid(z[1]), tanh(z[2]), sigmoid(z[3])};
}

// The sum of both biases, padded gate by gate with 0.
template <class Storage>
static void gather_bias(const Plan<Storage>& plan, ComputeOf<Storage>* to) {
  const Storage* sources[2] = {static_cast<const Storage*>(plan.in.bias_ih),
                               static_cast<const Storage*>(plan.in.bias_hh)};
  for (int64_t gate = 0; gate < 4; ++gate) {
    for (int64_t unit = 0; unit < plan.padded_hidden; ++unit) {
      ComputeOf<Storage> sum = 0;
      for (const Storage* source : sources) {
        if (source != nullptr && unit < plan.H) sum += to_compute(source[gate * plan.H + unit]);
      }
      to[gate * plan.padded_hidden + unit] = sum;
    }
  }
}

// A norm's gain or shift as a padded table; `otherwise` where it is absent.
template <class Storage>
static void gather_norm_parameter(const Plan<Storage>& plan, const void* source, int64_t gates,
                                  ComputeOf<Storage> otherwise, ComputeOf<Storage>* to) {
  for (int64_t gate = 0; gate < gates; ++gate) {
    for (int64_t unit = 0; unit < plan.padded_hidden; ++unit) {
      ComputeOf<Storage> value = unit < plan.H ? otherwise : 0;
      if (source != nullptr && unit < plan.H) {
        value = to_compute(static_cast<const Storage*>(source)[gate * plan.H + unit]);
      }
      to[gate * plan.padded_hidden + unit] = value;
    }
  }
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
