// Gradients of parameters come once a call, or once for each of several groups of consecutive rows
// (Options::gradient_groups). What such a gradient is summed over then lies together: group by group, in each group
// step by step.
#pragma once

#include "../common/params.h"
#include "../common/philox.h"

namespace fusedreg::cuda {

// Where row b stands in an array of `groups` groups: at step t it is number first + t * stride. With one group that is
// t * B + b, as everywhere else.
struct GroupedRow {
  int64_t first, stride;
  FUSEDREG_HOST_DEVICE int64_t at(int64_t t) const { return first + t * stride; }
};

FUSEDREG_HOST_DEVICE inline GroupedRow grouped_row(const LayerInputs& in, int64_t groups, int64_t b) {
  if (groups == 1) return {b, in.rows};
  const int64_t rows = in.rows / groups, group = b / rows;
  return {group * in.steps * rows + (b - group * rows), rows};
}

}  // namespace fusedreg::cuda
