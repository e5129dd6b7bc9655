// The products outside the loop: input and rebuilt recurrent pre-activations, weight gradients, input gradients.
#pragma once

#include "direct.h"
#include "pack.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

// out[pair][gate][unit] (+)= left[pair] . panel, for pairs and units in the given ranges.
template <class Compute>
static void gate_product(const Compute* left, int64_t left_stride, int64_t copy_stride, int64_t depth,
                         const Compute* panels, int64_t first_unit, int64_t last_unit, int64_t first_pair,
                         int64_t last_pair, int64_t padded_hidden, Compute* out, int64_t out_stride, bool accumulate) {
  constexpr int width = kWidth<Compute>;
  for (int64_t unit = first_unit; unit < last_unit; unit += width) {
    for_each_tile(last_pair - first_pair, [&](int64_t row, int rows) {
      const int64_t pair = first_pair + row;
      multiply_tile<Compute>(rows, kTileVectors,
                             {left + pair * left_stride, left_stride, 1, copy_stride, panels + unit * 4 * depth,
                              4 * width, depth, out + pair * out_stride + unit, out_stride, padded_hidden, accumulate,
                              part_of_next_panel(panels + (unit + width) * 4 * depth, row / kTileRows, depth)});
    });
  }
}

// The same with a weight that was not packed.
template <class Storage>
static void direct_gate_product(const Plan<Storage>& plan, const ComputeOf<Storage>* left, int64_t left_stride,
                                int64_t copy_stride, int64_t columns, const void* weight, int64_t first_unit,
                                int64_t last_unit, int64_t first_pair, int64_t last_pair, ComputeOf<Storage>* out) {
  for (int64_t unit = first_unit; unit < last_unit; unit += kWidth<ComputeOf<Storage>>) {
    for_each_tile(last_pair - first_pair, [&](int64_t row, int rows) {
      const int64_t pair = first_pair + row;
      dot_tile(plan, rows, left + pair * left_stride, left_stride, copy_stride, static_cast<const Storage*>(weight),
               columns, unit, out + pair * plan.gate_stride + unit, plan.gate_stride, plan.padded_hidden);
    });
  }
}

// The chunk's inputs as scratch rows, masked; four copies a row where the gates' masks are untied.
template <class Storage>
static void gather_inputs(const Plan<Storage>& plan, const ComputeOf<Storage>* masks, int64_t first_step, int64_t first,
                          int64_t last, ComputeOf<Storage>* to) {
  const int copies = plan.untied_input ? 4 : 1;
  const int64_t mask_stride = copies * plan.padded_input;
  const int64_t stride = copies * plan.input_stride;
  for_each_pair(plan, first_step, first, last, [&](int64_t pair, int64_t rank, int64_t s) {
    const Storage* from = input_row(plan, rank, s);
    for (int copy = 0; copy < copies; ++copy) {
      const ComputeOf<Storage>* mask =
          plan.input_dropout.drawn ? masks + rank * mask_stride + copy * plan.padded_input : nullptr;
      copy_row(from, mask, plan.I, plan.padded_input, to + pair * stride + copy * plan.input_stride);
    }
  });
}

// The chunk's h_{s-1} as scratch rows, masked the same way.
template <class Storage>
static void gather_hidden(const Plan<Storage>& plan, const Storage* hidden, const ComputeOf<Storage>* masks,
                          int64_t first_step, int64_t first, int64_t last, ComputeOf<Storage>* to) {
  const int copies = plan.untied_hidden ? 4 : 1;
  const int64_t stride = copies * plan.projected_stride;
  for_each_pair(plan, first_step, first, last, [&](int64_t pair, int64_t rank, int64_t s) {
    const Storage* from = previous_hidden_row(plan, hidden, rank, s);
    for (int copy = 0; copy < copies; ++copy) {
      const ComputeOf<Storage>* mask =
          plan.hidden_dropout.drawn ? masks + (rank * copies + copy) * plan.padded_projected : nullptr;
      copy_row(from, mask, plan.P, plan.padded_projected, to + pair * stride + copy * plan.projected_stride);
    }
  });
}

// Scratch rows (pairs, columns) as the right side of a product that sums over the pairs: panels of four vectors.
template <class Compute, class Pairs>
static void pack_pair_panels(const Compute* rows, int64_t row_stride, const Pairs& pairs, int64_t padded_columns,
                             int64_t first_panel, int64_t last_panel, Compute* to) {
  constexpr int width = kWidth<Compute>;
  constexpr int panel_width = width * kTileVectors;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    Compute* out = to + panel * pairs.count * panel_width;
    const int64_t begin = panel * panel_width;
    const int vectors = static_cast<int>(smaller(kTileVectors, (padded_columns - begin) / width));
    pairs.for_each([&](int64_t n, int64_t pair) {
      const Compute* from = rows + pair * row_stride + begin;
      for (int v = 0; v < vectors; ++v)
        store<Compute>(out + n * panel_width + v * width, load<Compute>(from + v * width));
    });
  }
}

constexpr int kTilesTurned = 8;

template <class Compute>
FUSEDREG_INLINE int64_t room_for_turned_tiles(int64_t pairs) {
  return kTilesTurned * (pairs * kTileRows + kWidth<Compute>);
}

// gradient[unit][column] += sum over pairs of dz[pair][unit] * right[pair][column], for one gate and a
// range of units. `left` is room for some tiles of dz, turned so that their pairs run last: each panel of the right
// side is used for all of them while it is in cache.
template <class Compute, class Pairs>
static void weight_gradient(const Compute* dz, int64_t dz_stride, const Compute* panels, const Pairs& pairs,
                            int64_t padded_columns, int64_t first_unit, int64_t last_unit, Compute* left,
                            Compute* gradient, int64_t gradient_stride, bool accumulate) {
  constexpr int width = kWidth<Compute>;
  constexpr int panel_width = width * kTileVectors;
  const int64_t tile_room = pairs.count * kTileRows + width;
  for (int64_t begin = first_unit; begin < last_unit; begin += kTilesTurned * kTileRows) {
    const int64_t end = smaller(begin + kTilesTurned * kTileRows, last_unit);
    for_each_numbered_tile(end - begin, [&](int64_t tile, int64_t row, int rows) {
      Compute* turned = left + tile * tile_room;
      pairs.for_each([&](int64_t n, int64_t pair) {
        const Compute* from = dz + pair * dz_stride + begin + row;
        // Whole vectors: what lies past the tile's rows is overwritten by the next pair, or is room past the last.
        for (int m = 0; m < rows; m += width) store<Compute>(turned + n * kTileRows + m, load<Compute>(from + m));
      });
    });
    for (int64_t column = 0, panel = 0; column < padded_columns; column += panel_width, ++panel) {
      const int vectors = static_cast<int>(smaller(kTileVectors, (padded_columns - column) / width));
      const Compute* right = panels + panel * pairs.count * panel_width;
      for_each_numbered_tile(end - begin, [&](int64_t tile, int64_t row, int rows) {
        multiply_tile<Compute>(rows, vectors,
                               {left + tile * tile_room, 1, kTileRows, 0, right, panel_width, pairs.count,
                                gradient + (begin + row) * gradient_stride + column, gradient_stride, width, accumulate,
                                part_of_next_panel(right + pairs.count * panel_width, tile, pairs.count)});
      });
    }
  }
}

// The right side of dz W: packed panels, or, where few rows meet it, the weight itself.
template <class Compute>
struct ColumnPanels {
  const Compute* first;
  int64_t panel_stride;  // between panels of four vectors of columns
  int64_t depth_stride;  // between the rows of the weight
};

// One tile of dz W: rows x up to four vectors of columns, over the `depth` rows of W.
template <class Compute>
FUSEDREG_INLINE void column_tile(int rows, int vectors, const Compute* dz, int64_t dz_row,
                                 const ColumnPanels<Compute>& panels, int64_t panel, int64_t tile, int64_t depth,
                                 Compute* out) {
  constexpr int width = kWidth<Compute>;
  const Compute* right = panels.first + panel * panels.panel_stride;
  multiply_tile<Compute>(rows, vectors,
                         {dz, dz_row, 1, 0, right, panels.depth_stride, depth, out, width * kTileVectors, width, false,
                          part_of_next_panel(right + panels.panel_stride, tile, depth)});
}

// The same where each gate saw its left side through a mask of its own: gate by gate, each share times its mask.
// `mask_of` gives the mask of a row of the tile and a gate, at the tile's first column.
template <class Compute, class MaskOf>
static void masked_column_tile(int rows, int vectors, const Compute* dz, int64_t dz_row,
                               const ColumnPanels<Compute>& panels, int64_t panel, int64_t padded_hidden,
                               const MaskOf& mask_of, Compute* out) {
  constexpr int width = kWidth<Compute>;
  constexpr int panel_width = width * kTileVectors;
  Compute part[kTileRows * panel_width];
  for (int gate = 0; gate < 4; ++gate) {
    multiply_tile<Compute>(rows, vectors,
                           {dz + gate * padded_hidden, dz_row, 1, 0,
                            panels.first + panel * panels.panel_stride + gate * padded_hidden * panels.depth_stride,
                            panels.depth_stride, padded_hidden, part, panel_width, width, false});
    for (int m = 0; m < rows; ++m) {
      const Compute* mask = mask_of(m, gate);
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = m * panel_width + v * width;
        const Vector<Compute> share = load<Compute>(part + at) * load<Compute>(mask + v * width);
        store<Compute>(out + at, gate == 0 ? share : load<Compute>(out + at) + share);
      }
    }
  }
}

// a = h W_hh^T of one vector of units for some of a worker's rows at step s. `next_unit`: whose turn it is after these.
template <class Context>
FUSEDREG_INLINE void recurrent_tile(const Context& context, const Share& share, int64_t s, int64_t unit,
                                    int64_t next_unit, int64_t first, int rows, typename Context::Compute* out,
                                    int64_t out_row, int64_t out_vector) {
  using Compute = typename Context::Compute;
  const auto& plan = context.plan;
  const int64_t stride = context.exchange_stride();
  const Compute* left = context.exchanged[s & 1] + (share.first_rank + first * share.rank_step) * stride;
  const int64_t copy_stride = plan.untied_hidden ? plan.projected_stride : 0;
  if (context.packed_hh == nullptr) {
    return dot_tile(plan, rows, left, share.rank_step * stride, copy_stride, context.weight_hh(), plan.P, unit, out,
                    out_row, out_vector);
  }
  multiply_tile<Compute>(rows, kTileVectors,
                         {left, share.rank_step * stride, 1, copy_stride, context.packed_hh + unit * 4 * plan.P,
                          4 * kWidth<Compute>, plan.P, out, out_row, out_vector, false,
                          part_of_next_panel(context.packed_hh + next_unit * 4 * plan.P, first / kTileRows, plan.P)});
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
