// The projection of a step, on the way back: from what reaches h_s and y to
//
//   du = dh_candidate W_hr
//
// for u = o tanh(c). W_hr's own gradient, the sum of dh_candidate^T u, is one product after the loop.
#pragma once

#include "gradient_context.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

// W_hr (P, H) as the right side of dh_candidate W_hr: panels of four vectors of units of u, [unit of h][unit of u].
template <class Storage>
static void pack_projection_columns(const BackwardContext<Storage>& context, const Share& share) {
  using Compute = ComputeOf<Storage>;
  constexpr int64_t panel_width = kPanelWidth<Compute>;
  const Plan<Storage>& plan = context.plan;
  int64_t first = 0, last = (share.last_unit - share.first_unit + panel_width - 1) / panel_width;
  if (plan.division == Division::Rows) split(last, 1, share.worker, share.workers, first, last);
  const Storage* weight = static_cast<const Storage*>(plan.in.weight_hr);
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t begin = share.first_unit + panel * panel_width;
    Compute* to = context.packed_projection_panels(share) + panel * plan.P * panel_width;
    const int64_t count = smaller(panel_width, smaller(share.last_unit, plan.H) - begin);
    for (int64_t unit = 0; unit < plan.P; ++unit) {
      copy_row(weight + unit * plan.H + begin, static_cast<const Compute*>(nullptr), count, panel_width,
               to + unit * panel_width);
    }
  }
}

// From h_s and y to dh_candidate, which the product after the loop reads too.
template <class Storage>
static void enter_projection(const BackwardContext<Storage>& context, const Share& share,
                             const GradientRow<Storage>* rows, int64_t count) {
  using Compute = ComputeOf<Storage>;
  for (int64_t i = 0; i < count; ++i) {
    const GradientRow<Storage>& row = rows[i];
    for (int64_t unit = share.first_projected; unit < share.last_projected; unit += kWidth<Compute>) {
      const StepMasks<Compute> step = hidden_step_masks(context.plan, context.masks, row.rank, row.t, unit);
      store<Compute>(row.grad_projected + unit, context.enter_hidden(row, unit, step));
    }
  }
}

// And to du, of all units of h.
template <class Storage>
static void leave_projection(const BackwardContext<Storage>& context, const Share& share,
                             const GradientRow<Storage>* rows, int64_t count) {
  using Compute = ComputeOf<Storage>;
  constexpr int width = kWidth<Compute>;
  constexpr int64_t panel_width = kPanelWidth<Compute>;
  const Plan<Storage>& plan = context.plan;
  const ColumnPanels<Compute> panels = context.projection_column_panels(share);
  for (int64_t begin = share.first_unit; begin < share.last_unit; begin += panel_width) {
    const int64_t panel = (begin - share.first_unit) / panel_width;
    const int vectors = static_cast<int>(smaller(kTileVectors, (share.last_unit - begin) / width));
    for_each_numbered_tile(count, [&](int64_t tile, int64_t first, int tile_rows) {
      Compute sum[kTileRows * panel_width];
      column_tile<Compute>(tile_rows, vectors, rows[first].grad_projected, share.rank_step * plan.projected_stride,
                           panels, panel, tile, plan.P, sum);
      for (int m = 0; m < tile_rows; ++m) {
        for (int v = 0; v < vectors; ++v) {
          store<Compute>(rows[first + m].grad_unprojected + begin + v * width,
                         load<Compute>(sum + m * panel_width + v * width));
        }
      }
    });
  }
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
