// What the parameters' gradients are made of once the loop has left da and dz: the h that each step's product read, and
// sums over all rows and steps. Both are deterministic: no atomics, and an order that only the shapes decide.
#pragma once

#include <cstddef>
#include <cstdint>

#include "masks.cuh"

namespace fusedreg::cuda {

// Whether the recurrent product reads masked copies of h, and whether by a mask a gate.
bool drops_hidden(const LayerInputs& in);
inline bool unties_hidden(const LayerInputs& in) { return drops_hidden(in) && in.options.untied_masks; }

// h̄_{s-1} = m_h^k ⊙ h_{s-1} of one gate (0 where masks are tied, or not drawn), masked by zeros and ones, (T * B, P)
// storage: at the position of step s; 0 where the step begins from zero, and in padding. `hidden`: the carried h_s, (T,
// B, P) storage. Rows stand in `groups` groups: row_groups.h.
void gather_previous_hidden(const LayerInputs& in, const MaskSeed& seed, const void* hidden, int gate, int64_t groups,
                            void* to, void* stream);

// (T, B, columns) storage into the order of row_groups.h.
void group_rows(const LayerInputs& in, const void* from, int64_t columns, int64_t groups, void* to, void* stream);

// Sums over the rows and steps that are valid of `values` and of `values` times each of up to two factors; over all of
// them, or (groups, columns) over each group's.
struct ColumnSums {
  LayerInputs in;
  const int64_t* counts = nullptr;  // of count_rows, with batch norm
  int64_t columns = 0;              // 4H or H
  int64_t groups = 1;
  const void* values = nullptr;  // (T, B, columns): compute, or storage where `narrow`
  bool narrow = false;
  // (T, B, columns) compute. With `statistics`, those of its norm, the factor is what that norm has made of it, without
  // the gain; else it is the factor itself.
  struct Factor {
    const void* values = nullptr;
    const void* statistics = nullptr;
    bool input = false;  // the norm is that of the input terms
  };
  Factor factors[2];
  // Where the sums go: [0] those of the values, [1] and [2] those with the factors. In storage; null: not wanted.
  static constexpr int kCopies = 4;
  void* results[3][kCopies] = {};
  void* totals[3] = {};  // the same in the compute type; of one group
};

size_t column_sums_scratch(const ColumnSums& sums);
void sum_columns(const ColumnSums& sums, void* scratch, void* stream);

}  // namespace fusedreg::cuda
