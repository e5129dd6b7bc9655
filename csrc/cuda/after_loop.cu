#include "after_loop.h"

#include "element_types.h"
#include "elementwise.h"
#include "masks.cuh"
#include "norm_site.cuh"
#include "row_groups.h"

namespace fusedreg::cuda {
namespace {

constexpr int64_t kStepsAThread = 16;  // one draw serves them all
constexpr int64_t kLargestGridY = 32768;

// ---- the h that each step's product read ----

template <class Storage>
struct HiddenParams {
  LayerInputs in;
  MaskSeed seed;
  MaskSite<ComputeOf<Storage>> site;
  int gate;
  int64_t groups;
  int64_t steps_a_thread;
  const Storage* hidden;
  Storage* to;
};

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads,
                                       1) void previous_hidden_kernel(FUSEDREG_PARAMETER HiddenParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = params.in;
  const int64_t width = in.projected_size, at = element_index(), row_elements = in.rows * width;
  if (at >= row_elements) return;
  const int64_t b = at / width, unit = at % width, length = row_length(in, b);
  Compute mask = params.site.kept;
  if (params.site.threshold > 0) {
    const MaskKey key = key_of_row(params.seed, mask_key(params.seed, layer_direction(in)), b);
    const bool untied = in.options.untied_masks;
    const auto words = words_of(key, unit, untied ? kUntiedHiddenFamily : kSequenceFamily);
    mask = mask_of(params.site, chosen_word(words, untied ? params.gate : kHiddenTied));
  }
  const Storage* initial = static_cast<const Storage*>(in.initial_hidden);
  const GroupedRow place = grouped_row(in, params.groups, b);
  const int64_t first = block_index_y() * params.steps_a_thread;
  for (int64_t t = first; t < first + params.steps_a_thread && t < in.steps; ++t) {
    const int64_t s = step_of(in, length, t);
    Compute value = 0;
    if (s < length && !begins_from_zero(in, b, length, s)) {
      if (s > 0) {
        value = widen(params.hidden[position(in, length, s - 1) * row_elements + at]);
      } else if (initial != nullptr) {
        value = widen(initial[at]);
      }
      value *= mask;
    }
    params.to[place.at(t) * width + unit] = narrow<Storage>(value);
  }
}

template <class Storage>
struct GroupParams {
  LayerInputs in;
  int64_t columns, groups;
  const Storage* from;
  Storage* to;
};

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads,
                                       1) void group_rows_kernel(FUSEDREG_PARAMETER GroupParams<Storage> params) {
  const LayerInputs& in = params.in;
  const int64_t at = element_index(), row = at / params.columns, column = at - row * params.columns;
  if (row >= in.steps * in.rows) return;
  const int64_t t = row / in.rows, b = row - t * in.rows;
  params.to[grouped_row(in, params.groups, b).at(t) * params.columns + column] = params.from[at];
}

// ---- column sums, in two stages ----

constexpr int64_t kPieces = 512;     // into which the rows are cut
constexpr int64_t kRowsAPiece = 64;  // at least

struct DeviceFactor {
  const void* values;
  bool normalised;
  NormSite site;
};

template <class Value>
struct SumParams {
  LayerInputs in;
  int64_t columns, groups, rows_a_piece, pieces;
  const Value* values;
  DeviceFactor factors[2];
  ComputeOf<Value>* partial;  // (groups, pieces, 3, columns)
};

// A thread has one column of one piece of a group's rows, all of its steps one after another.
template <class Value>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads,
                                       1) void sum_pieces_kernel(FUSEDREG_PARAMETER SumParams<Value> params) {
  using Compute = ComputeOf<Value>;
  const LayerInputs& in = params.in;
  const int64_t tiles = pieces(params.columns, kElementThreads), group = block_index() / tiles;
  const int64_t column = block_index() % tiles * kElementThreads + thread_index();
  if (column >= params.columns) return;
  const int64_t rows = in.rows / params.groups, all = in.steps * rows;
  const int64_t first = block_index_y() * params.rows_a_piece;
  const int64_t last = first + params.rows_a_piece < all ? first + params.rows_a_piece : all;
  Compute sums[3] = {};
  for (int64_t of_group = first; of_group < last; ++of_group) {
    const int64_t t = of_group / rows, b = group * rows + of_group % rows, length = row_length(in, b);
    if (t >= length) continue;
    const int64_t row = t * in.rows + b;
    const Compute value = widen(params.values[row * params.columns + column]);
    sums[0] += value;
    for (int which = 0; which < 2; ++which) {
      const DeviceFactor& given = params.factors[which];
      if (given.values == nullptr) continue;
      Compute factor = static_cast<const Compute*>(given.values)[row * params.columns + column];
      if (given.normalised) {
        const auto moments = given.site.template moments<Compute>(step_of(in, length, t), t, b, column);
        factor = (factor - moments.mean) * moments.spread_scale(in.norm_eps);
      }
      sums[1 + which] += value * factor;
    }
  }
  Compute* partial = params.partial + (group * params.pieces + block_index_y()) * 3 * params.columns + column;
  for (int which = 0; which < 3; ++which) partial[which * params.columns] = sums[which];
}

template <class Storage>
struct FinishParams {
  int64_t columns, groups, pieces;
  const ComputeOf<Storage>* partial;
  Storage* results[3][ColumnSums::kCopies];
  ComputeOf<Storage>* totals[3];
};

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads,
                                       1) void finish_sums_kernel(FUSEDREG_PARAMETER FinishParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  const int64_t at = element_index(), group = at / params.columns, column = at % params.columns;
  if (group >= params.groups) return;
  for (int which = 0; which < 3; ++which) {
    Compute total = 0;
    for (int64_t piece = 0; piece < params.pieces; ++piece) {
      total += params.partial[((group * params.pieces + piece) * 3 + which) * params.columns + column];
    }
    for (Storage* result : params.results[which]) {
      if (result != nullptr) result[at] = narrow<Storage>(total);
    }
    if (params.totals[which] != nullptr) params.totals[which][at] = total;
  }
}

int64_t rows_of_group(const ColumnSums& sums) { return sums.in.steps * (sums.in.rows / sums.groups); }
int64_t rows_a_piece(const ColumnSums& sums) { return piece_of(rows_of_group(sums), kRowsAPiece, kPieces); }
int64_t pieces_of(const ColumnSums& sums) { return pieces(rows_of_group(sums), rows_a_piece(sums)); }

template <class Value>
void run_pieces(const ColumnSums& sums, void* scratch, void* stream) {
  SumParams<Value> params{};
  params.in = sums.in;
  params.columns = sums.columns;
  params.groups = sums.groups;
  params.rows_a_piece = rows_a_piece(sums);
  params.pieces = pieces_of(sums);
  params.values = static_cast<const Value*>(sums.values);
  for (int which = 0; which < 2; ++which) {
    const ColumnSums::Factor& given = sums.factors[which];
    params.factors[which] = {given.values, given.statistics != nullptr,
                             norm_site(sums.in, given.input, sums.columns, given.statistics, sums.counts)};
  }
  params.partial = static_cast<ComputeOf<Value>*>(scratch);
  Launch how = element_launch(sums.columns, stream, params.pieces);
  how.grid_x *= static_cast<int>(sums.groups);
  launch<sum_pieces_kernel<Value>>(how, params);
}

}  // namespace

bool drops_hidden(const LayerInputs& in) { return in.options.training && in.rates.hidden_dropout > 0; }

void gather_previous_hidden(const LayerInputs& in, const MaskSeed& seed, const void* hidden, int gate, int64_t groups,
                            void* to, void* stream) {
  with_storage(in.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    HiddenParams<Storage> params{};
    params.in = in;
    params.seed = seed;
    params.site = unscaled_site<ComputeOf<Storage>>(in.rates.hidden_dropout, in.options.training);
    params.gate = gate;
    params.groups = groups;
    params.steps_a_thread = piece_of(in.steps, kStepsAThread, kLargestGridY);
    params.hidden = static_cast<const Storage*>(hidden);
    params.to = static_cast<Storage*>(to);
    launch<previous_hidden_kernel<Storage>>(
        element_launch(in.rows * in.projected_size, stream, pieces(in.steps, params.steps_a_thread)), params);
  });
}

void group_rows(const LayerInputs& in, const void* from, int64_t columns, int64_t groups, void* to, void* stream) {
  with_storage(in.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const GroupParams<Storage> params{in, columns, groups, static_cast<const Storage*>(from),
                                      static_cast<Storage*>(to)};
    launch<group_rows_kernel<Storage>>(element_launch(in.steps * in.rows * columns, stream), params);
  });
}

size_t column_sums_scratch(const ColumnSums& sums) {
  return sums.groups * pieces_of(sums) * 3 * sums.columns * bytes_of(compute_type(sums.in.dtype));
}

void sum_columns(const ColumnSums& sums, void* scratch, void* stream) {
  with_storage(sums.in.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    using Compute = ComputeOf<Storage>;
    if (sums.narrow) {
      run_pieces<Storage>(sums, scratch, stream);
    } else {
      run_pieces<Compute>(sums, scratch, stream);
    }
    FinishParams<Storage> params{};
    params.columns = sums.columns;
    params.groups = sums.groups;
    params.pieces = pieces_of(sums);
    params.partial = static_cast<const Compute*>(scratch);
    for (int which = 0; which < 3; ++which) {
      for (int copy = 0; copy < ColumnSums::kCopies; ++copy) {
        params.results[which][copy] = static_cast<Storage*>(sums.results[which][copy]);
      }
      params.totals[which] = static_cast<Compute*>(sums.totals[which]);
    }
    launch<finish_sums_kernel<Storage>>(element_launch(sums.groups * sums.columns, stream), params);
  });
}

}  // namespace fusedreg::cuda
