// Weights and sequences rearranged for the micro-kernel, with their masks applied on the way.
#pragma once

#include "plan.h"
#include "tile.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

// Turns a square of vectors: element (m, n) and element (n, m) change places, halves first, then quarters ...
template <class Compute, int Distance>
FUSEDREG_INLINE void transpose(Vector<Compute> (&rows)[kWidth<Compute>]) {
  constexpr int width = kWidth<Compute>;
#pragma GCC unroll 16
  for (int n = 0; n < width; ++n) {
    if ((n & Distance) == 0) exchange_halves<Compute, Distance>(rows[n], rows[n + Distance]);
  }
  if constexpr (Distance > 1) transpose<Compute, Distance / 2>(rows);
}

// Rows of a matrix, `columns` long, as a vector for each column: lane n of the one at out + k * stride is rows[n][k].
template <class Compute>
static void turn_rows(const Compute* const (&rows)[kWidth<Compute>], int64_t columns, Compute* out, int64_t stride) {
  constexpr int width = kWidth<Compute>;
  int64_t k = 0;
  for (; k + width <= columns; k += width) {
    Vector<Compute> block[width];
#pragma GCC unroll 16
    for (int lane = 0; lane < width; ++lane) block[lane] = load<Compute>(rows[lane] + k);
    transpose<Compute, width / 2>(block);
#pragma GCC unroll 16
    for (int n = 0; n < width; ++n) store<Compute>(out + (k + n) * stride, block[n]);
  }
  for (; k < columns; ++k) {
    for (int lane = 0; lane < width; ++lane) out[k * stride + lane] = rows[lane][k];
  }
}

// A weight (4H, columns) as the right side of x W^T or h W^T. Panel n holds units n * width ... of all four gates:
// [column][gate][unit]. A unit's gates come out of the micro-kernel side by side.
template <class Storage>
static void pack_gate_panels(const Plan<Storage>& plan, const Storage* weight, int64_t columns, bool dropped,
                             int64_t first_unit, int64_t last_unit, ComputeOf<Storage>* rows, ComputeOf<Storage>* to) {
  using Compute = ComputeOf<Storage>;
  constexpr int width = kWidth<Compute>;
  const int64_t row_stride = rounded_up(columns, 4 * width);
  Compute* mask = rows + width * row_stride;
  for (int64_t unit = first_unit; unit < last_unit; unit += width) {
    Compute* panel = to + unit * 4 * columns;
    for (int gate = 0; gate < 4; ++gate) {
      const Compute* lane_rows[width];
      if (sizeof(Storage) == sizeof(Compute) && !dropped && unit + width <= plan.H) {
        // The weight itself is what is wanted, row by row.
        for (int lane = 0; lane < width; ++lane) {
          lane_rows[lane] = reinterpret_cast<const Compute*>(weight + (gate * plan.H + unit + lane) * columns);
        }
      } else {
        for (int lane = 0; lane < width; ++lane) {
          Compute* row = rows + lane * row_stride;
          lane_rows[lane] = row;
          if (unit + lane >= plan.H) {
            for (int64_t k = 0; k < columns; ++k) row[k] = 0;
            continue;
          }
          const int64_t gate_row = gate * plan.H + unit + lane;
          if (dropped) {
            fill_weight_mask<Compute>(plan.weight_dropout, plan.key, plan.in.options.weight_mask_row, gate_row, 0,
                                      columns, mask);
          }
          const Storage* from = weight + gate_row * columns;
          for (int64_t k = 0; k < columns; k += width) {
            const Vector<Compute> value = load_some(from + k, static_cast<int>(smaller(width, columns - k)));
            store<Compute>(row + k, dropped ? value * load<Compute>(mask + k) : value);
          }
        }
      }
      turn_rows<Compute>(lane_rows, columns, panel + gate * width, 4 * width);
    }
  }
}

// A weight (4H, columns) as the right side of dz W: the sum runs over its rows. Panels of four vectors of columns,
// from `first_column` on: [gate, unit][column]. Units are padded as they are in scratch rows.
template <class Storage>
static void pack_column_panels(const Plan<Storage>& plan, const Storage* weight, int64_t columns, bool dropped,
                               int64_t first_column, int64_t last_column, int64_t first_panel, int64_t last_panel,
                               ComputeOf<Storage>* mask, ComputeOf<Storage>* to) {
  using Compute = ComputeOf<Storage>;
  constexpr int width = kWidth<Compute>;
  constexpr int panel_width = width * kTileVectors;
  const int64_t depth = 4 * plan.padded_hidden;
  for (int64_t row = 0; row < depth; ++row) {
    const int64_t gate = row / plan.padded_hidden, unit = row % plan.padded_hidden;
    const int64_t gate_row = gate * plan.H + unit;
    const bool real = unit < plan.H;
    if (dropped && real) {
      fill_weight_mask<Compute>(plan.weight_dropout, plan.key, plan.in.options.weight_mask_row, gate_row,
                                first_column + first_panel * panel_width,
                                smaller(columns, first_column + last_panel * panel_width), mask);
    }
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      Compute* out = to + (panel * depth + row) * panel_width;
      const int64_t begin = first_column + panel * panel_width;
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t column = begin + v * width;
        const int64_t limit = smaller(last_column, columns);
        Vector<Compute> value{};
        if (real && column < limit) {
          value = load_some(weight + gate_row * columns + column, static_cast<int>(smaller(width, limit - column)));
          if (dropped) value *= load<Compute>(mask + column);
        }
        store<Compute>(out + v * width, value);
      }
    }
  }
}

// Copies one row of a sequence into scratch, times a mask where there is one; `padded` values, 0 past `count`.
template <class Storage>
FUSEDREG_INLINE void copy_row(const Storage* from, const ComputeOf<Storage>* mask, int64_t count, int64_t padded,
                              ComputeOf<Storage>* to) {
  using Compute = ComputeOf<Storage>;
  constexpr int width = kWidth<Compute>;
  for (int64_t k = 0; k < padded; k += width) {
    Vector<Compute> value{};
    if (from != nullptr && k < count) value = load_some(from + k, static_cast<int>(smaller(width, count - k)));
    if (mask != nullptr) value *= load<Compute>(mask + k);
    store<Compute>(to + k, value);
  }
}

// Where the row that belongs to a (step, rank) pair stands; null reads as zeros.
template <class Storage>
FUSEDREG_INLINE const Storage* input_row(const Plan<Storage>& plan, int64_t rank, int64_t s) {
  return static_cast<const Storage*>(plan.in.input) + plan.position(rank, s) * plan.in.input_step_stride +
         plan.order[rank] * plan.in.input_row_stride;
}

template <class Storage>
FUSEDREG_INLINE const Storage* previous_hidden_row(const Plan<Storage>& plan, const Storage* hidden, int64_t rank,
                                                   int64_t s) {
  if (plan.reset_at(rank, s)) return nullptr;
  const int64_t b = plan.order[rank];
  if (s > 0) return hidden + (plan.position(rank, s - 1) * plan.B + b) * plan.P;
  const Storage* initial = static_cast<const Storage*>(plan.in.initial_hidden);
  return initial == nullptr ? nullptr : initial + b * plan.P;
}

// Calls body(pair, rank, s) for the pairs first ... last - 1 of the chunk of steps that begins at `first_step`.
template <class Storage, class Body>
FUSEDREG_INLINE void for_each_pair(const Plan<Storage>& plan, int64_t first_step, int64_t first, int64_t last,
                                   const Body& body) {
  int64_t s = first_step;
  const int64_t origin = plan.first[first_step];
  while (plan.first[s + 1] - origin <= first && s + 1 < plan.T) ++s;
  for (int64_t pair = first; pair < last; ++pair) {
    while (plan.first[s + 1] - origin <= pair) ++s;
    body(pair, pair - (plan.first[s] - origin), s);
  }
}

// The pairs of a chunk of steps over which a parameter's gradient sums: all of them ...
template <class Storage>
struct AllPairs {
  const Plan<Storage>& plan;
  int64_t first_step;
  int64_t count;
  static constexpr int64_t group = 0;
  static constexpr int64_t before = 0;

  // body(n, pair) for the n-th of them.
  template <class Body>
  FUSEDREG_METHOD void for_each(const Body& body) const {
    for (int64_t pair = 0; pair < count; ++pair) body(pair, pair);
  }
  // body(pair, rank, s)
  template <class Body>
  FUSEDREG_METHOD void for_each_place(const Body& body) const {
    for_each_pair(plan, first_step, 0, count, body);
  }
};

// ... or those of one group of rows. A group's ranks stand longest first, as all ranks do.
template <class Storage>
struct GroupPairs {
  const Plan<Storage>& plan;
  int64_t first_step, last_step;
  int64_t group;
  int64_t count;
  int64_t before;  // in the groups before it

  template <class Body>
  FUSEDREG_METHOD void for_each(const Body& body) const {
    int64_t n = 0;
    for_each_place([&](int64_t pair, int64_t, int64_t) { body(n++, pair); });
  }
  template <class Body>
  FUSEDREG_METHOD void for_each_place(const Body& body) const {
    const int64_t rows = plan.rows_of_group();
    const int64_t* ranks = plan.group_ranks + group * rows;
    for (int64_t s = first_step; s < last_step; ++s) {
      const int64_t pair = plan.first[s] - plan.first[first_step];
      for (int64_t n = 0; n < rows && plan.length[ranks[n]] > s; ++n) body(pair + ranks[n], ranks[n], s);
    }
  }
};

// Calls body(pairs) once for all pairs of a chunk, or once for each group of rows.
template <class Storage, class Body>
FUSEDREG_INLINE void for_each_group(const Plan<Storage>& plan, int64_t first_step, int64_t last_step,
                                    const Body& body) {
  if (plan.groups == 1) {
    return body(AllPairs<Storage>{plan, first_step, plan.first[last_step] - plan.first[first_step]});
  }
  int64_t before = 0;
  for (int64_t group = 0; group < plan.groups; ++group) {
    int64_t count = 0;
    for (int64_t n = 0; n < plan.rows_of_group(); ++n) {
      const int64_t length = plan.length[plan.group_ranks[group * plan.rows_of_group() + n]];
      if (length > first_step) count += smaller(length, last_step) - first_step;
    }
    body(GroupPairs<Storage>{plan, first_step, last_step, group, count, before});
    before += count;
  }
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
