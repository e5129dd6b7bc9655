// The step with layer normalisation (Ba et al. 2016), forward: over all 4H of a row for both pre-activations, over H
// for the cell. A worker owns whole rows, so a row's statistics are its own.
#pragma once

#include "context.h"
#include "moments.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

template <class Compute>
struct RowMoments {
  Compute mean = 0, variance = 1;

  FUSEDREG_METHOD Compute scale(double eps) const {
    return inverse_square_root<Compute>(broadcast<Compute>(variance + static_cast<Compute>(eps)))[0];
  }
  // As Moments::spread_scale.
  FUSEDREG_METHOD Compute spread_scale(double eps) const { return variance > 0 ? scale(eps) : Compute(0); }
};

template <class Compute>
FUSEDREG_INLINE Compute sum_of_lanes(Vector<Compute> x) {
  Compute sum = 0;
  for (int lane = 0; lane < kWidth<Compute>; ++lane) sum += x[lane];
  return sum;
}

// The first `count` lanes; 0 in the rest.
template <class Compute>
FUSEDREG_INLINE Vector<Compute> first_lanes(Vector<Compute> x, int count) {
  if (count >= kWidth<Compute>) return x;
  for (int lane = 0; lane < kWidth<Compute>; ++lane) x[lane] = lane < count ? x[lane] : Compute(0);
  return x;
}

// Over `groups` x `hidden` values that stand in groups of `padded`.
template <class Compute>
static RowMoments<Compute> moments_of_row(const Compute* from, int groups, int64_t hidden, int64_t padded) {
  using V = Vector<Compute>;
  const Compute inverse = Compute(1) / static_cast<Compute>(groups * hidden);
  V sum{};
  for (int group = 0; group < groups; ++group) {
    V part{};  // by groups, so that fewer terms are summed in a row
    for (int64_t unit = 0; unit < hidden; unit += kWidth<Compute>) {
      part += first_lanes<Compute>(load<Compute>(from + group * padded + unit),
                                   static_cast<int>(smaller(kWidth<Compute>, hidden - unit)));
    }
    sum += part;
  }
  const Compute mean = sum_of_lanes<Compute>(sum) * inverse;
  V squares{};
  for (int group = 0; group < groups; ++group) {
    V part{};
    for (int64_t unit = 0; unit < hidden; unit += kWidth<Compute>) {
      const V difference = first_lanes<Compute>(load<Compute>(from + group * padded + unit) - mean,
                                                static_cast<int>(smaller(kWidth<Compute>, hidden - unit)));
      part += difference * difference;
    }
    squares += part;
  }
  return {mean, sum_of_lanes<Compute>(squares) * inverse};
}

// Statistics results of layer norm: (T, 2, B), at position t.
template <class Compute>
FUSEDREG_INLINE void store_row_moments(void* statistics, int64_t t, int64_t b, int64_t rows,
                                       const RowMoments<Compute>& moments) {
  if (statistics == nullptr) return;
  static_cast<Compute*>(statistics)[t * 2 * rows + b] = moments.mean;
  static_cast<Compute*>(statistics)[(t * 2 + 1) * rows + b] = moments.variance;
}

template <class Compute>
FUSEDREG_INLINE RowMoments<Compute> load_row_moments(const void* statistics, int64_t t, int64_t b, int64_t rows) {
  const Compute* from = static_cast<const Compute*>(statistics);
  return {from[t * 2 * rows + b], from[(t * 2 + 1) * rows + b]};
}

template <class Storage>
static void layer_norm_step(ForwardContext<Storage>& context, const Share& share, int64_t s,
                            const StepRow<Storage>* rows, int64_t count) {
  using Compute = ComputeOf<Storage>;
  using V = Vector<Compute>;
  constexpr int width = kWidth<Compute>;
  const Plan<Storage>& plan = context.plan;
  const Options& options = plan.in.options;
  const LayerOutputs& out = context.params.out;
  const double eps = plan.in.norm_eps;
  const int64_t padded = plan.padded_hidden;
  for (int64_t unit = 0; unit < padded; unit += width) {
    for_each_tile(count, [&](int64_t first, int tile_rows) {
      recurrent_tile(context, share, s, unit, unit + width, first, tile_rows,
                     context.recurrent_gates + (share.first_rank + first * share.rank_step) * plan.gate_stride + unit,
                     share.rank_step * plan.gate_stride, padded);
    });
  }
  Compute* candidates = context.room_of(share);
  Compute* output_gates = candidates + padded;
  Compute* previous_cells = output_gates + padded;
  Compute* step_rows = previous_cells + padded;  // [3][unit]: the masks that the second pass needs
  for (int64_t i = 0; i < count; ++i) {
    const StepRow<Storage>& row = rows[i];
    const Compute* a = context.recurrent_gates + row.rank * plan.gate_stride;
    RowMoments<Compute> input, recurrent;
    Compute input_scale = 1, recurrent_scale = 1;
    if (options.norm_input) {
      input = moments_of_row<Compute>(row.input_gates, 4, plan.H, padded);
      input_scale = input.scale(eps);
      store_row_moments(out.input_statistics, row.t, row.b, plan.B, input);
    }
    if (options.norm_recurrent) {
      recurrent = moments_of_row<Compute>(a, 4, plan.H, padded);
      recurrent_scale = recurrent.scale(eps);
      store_row_moments(out.recurrent_statistics, row.t, row.b, plan.B, recurrent);
    }
    for (int64_t unit = 0; unit < padded; unit += width) {
      V z[4];
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t at = gate * padded + unit;
        const V r = load<Compute>(row.input_gates + at), raw = load<Compute>(a + at);
        context.keep_pre_activations(row, gate, unit, raw, r);
        z[gate] = (raw - recurrent.mean) * recurrent_scale * load<Compute>(context.norm.recurrent_gain + at) +
                  ((r - input.mean) * input_scale * load<Compute>(context.norm.input_gain + at) +
                   load<Compute>(context.bias + at));
      }
      const StepMasks<Compute> step = step_masks(plan, context.masks, row.rank, row.t, unit);
      V previous_cell, candidate;
      const Gates<V> gates = context.begin_cell(row, unit, z, step, previous_cell, candidate);
      if (!options.norm_cell) {
        context.finish_cell(row, unit, step, previous_cell, gates.o, candidate, candidate);
        continue;
      }
      store<Compute>(candidates + unit, candidate);
      store<Compute>(output_gates + unit, gates.o);
      store<Compute>(previous_cells + unit, previous_cell);
      store<Compute>(step_rows + unit, step.zone_hidden);
      store<Compute>(step_rows + padded + unit, step.zone_cell);
      store<Compute>(step_rows + 2 * padded + unit, step.output);
    }
    if (!options.norm_cell) continue;
    const RowMoments<Compute> cell = moments_of_row<Compute>(candidates, 1, plan.H, padded);
    const Compute cell_scale = cell.scale(eps);
    store_row_moments(out.cell_statistics, row.t, row.b, plan.B, cell);
    for (int64_t unit = 0; unit < padded; unit += width) {
      StepMasks<Compute> step{};
      step.zone_hidden = load<Compute>(step_rows + unit);
      step.zone_cell = load<Compute>(step_rows + padded + unit);
      step.output = load<Compute>(step_rows + 2 * padded + unit);
      const V candidate = load<Compute>(candidates + unit);
      const V normalised = (candidate - cell.mean) * cell_scale * load<Compute>(context.norm.cell_gain + unit) +
                           load<Compute>(context.norm.cell_shift + unit);
      context.finish_cell(row, unit, step, load<Compute>(previous_cells + unit), load<Compute>(output_gates + unit),
                          candidate, normalised);
    }
  }
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
