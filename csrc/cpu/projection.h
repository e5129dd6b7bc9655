// The projection of a step, forward: u = o tanh(c) of all units has been written, and
//
//   h_candidate = u W_hr^T
//
// is multiplied out, each vector of its units going on to all that is carried and returned of h.
#pragma once

#include "context.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

// W_hr (P, H) as the right side of u W_hr^T: the panels of this worker, or its part of those that all share.
template <class Storage>
static void pack_projection(const ForwardContext<Storage>& context, const Share& share) {
  using Compute = ComputeOf<Storage>;
  constexpr int width = kWidth<Compute>;
  constexpr int64_t panel_width = kPanelWidth<Compute>;
  const Plan<Storage>& plan = context.plan;
  int64_t first = 0, last = (share.last_projected - share.first_projected + panel_width - 1) / panel_width;
  if (plan.division == Division::Rows) split(last, 1, share.worker, share.workers, first, last);
  const int64_t row_stride = rounded_up(plan.H, width);
  Compute* rows = context.room_of(share);
  for (int64_t panel = first; panel < last; ++panel) {
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t begin = share.first_projected + panel * panel_width + v * width;
      const Compute* lane_rows[width];
      for (int lane = 0; lane < width; ++lane) {
        const int64_t unit = begin + lane;
        const Storage* from = unit < plan.P ? context.weight_hr() + unit * plan.H : nullptr;
        copy_row(from, static_cast<const Compute*>(nullptr), plan.H, row_stride, rows + lane * row_stride);
        lane_rows[lane] = rows + lane * row_stride;
      }
      turn_rows<Compute>(lane_rows, plan.H, context.packed_projection(share) + panel * plan.H * panel_width + v * width,
                         panel_width);
    }
  }
}

// One tile of u W_hr^T: rows x up to four vectors of units of h.
template <class Storage>
FUSEDREG_INLINE void projection_tile(const ForwardContext<Storage>& context, const Share& share, int64_t begin,
                                     int vectors, const ComputeOf<Storage>* left, int64_t left_row, int rows,
                                     int64_t tile, ComputeOf<Storage>* out) {
  using Compute = ComputeOf<Storage>;
  constexpr int width = kWidth<Compute>;
  constexpr int64_t panel_width = kPanelWidth<Compute>;
  const Plan<Storage>& plan = context.plan;
  if (context.packed_hr != nullptr) {
    const Compute* right = context.packed_projection(share) + (begin - share.first_projected) * plan.H;
    return multiply_tile<Compute>(rows, vectors,
                                  {left, left_row, 1, 0, right, panel_width, plan.H, out, panel_width, width, false,
                                   part_of_next_panel(right + plan.H * panel_width, tile, plan.H)});
  }
  for (int v = 0; v < vectors; ++v) {
    const int64_t unit = begin + v * width;
    const int units = static_cast<int>(smaller(width, plan.P - unit));
    for (int m = 0; m < rows; ++m) {
      store<Compute>(out + m * panel_width + v * width,
                     dot_units(left + m * left_row, context.weight_hr() + unit * plan.H, plan.H, units));
    }
  }
}

template <class Storage>
static void project(const ForwardContext<Storage>& context, const Share& share, const StepRow<Storage>* rows,
                    int64_t count) {
  using Compute = ComputeOf<Storage>;
  constexpr int width = kWidth<Compute>;
  constexpr int64_t panel_width = kPanelWidth<Compute>;
  const Plan<Storage>& plan = context.plan;
  for (int64_t begin = share.first_projected; begin < share.last_projected; begin += panel_width) {
    const int vectors = static_cast<int>(smaller(kTileVectors, (share.last_projected - begin) / width));
    for_each_numbered_tile(count, [&](int64_t tile, int64_t first, int tile_rows) {
      Compute candidates[kTileRows * panel_width];
      projection_tile(context, share, begin, vectors, rows[first].unprojected, share.rank_step * plan.hidden_stride,
                      tile_rows, tile, candidates);
      for (int m = 0; m < tile_rows; ++m) {
        const StepRow<Storage>& row = rows[first + m];
        for (int v = 0; v < vectors; ++v) {
          const int64_t unit = begin + v * width;
          context.finish_hidden(row, unit, hidden_step_masks(plan, context.masks, row.rank, row.t, unit),
                                load<Compute>(candidates + m * panel_width + v * width));
        }
      }
    });
  }
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
