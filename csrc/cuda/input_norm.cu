#include "input_norm.h"

#include "element_types.h"
#include "elementwise.h"
#include "norm_site.cuh"

namespace fusedreg::cuda {
namespace {

constexpr int64_t kPieces = 512;       // into which the rows of a pooled norm are cut
constexpr int64_t kRowsAPiece = 64;    // at least
constexpr int64_t kSummedInARow = 32;  // terms, so that rounding grows with the groups and not with the rows
constexpr int kWarps = kElementThreads / 32;

template <class Storage>
struct InputNormParams {
  using Compute = ComputeOf<Storage>;
  InputNorm norm;
  NormSite site;
  Compute* normalised;
  Compute* partial;  // of pooled statistics: (pieces, 3, 4H), of which the count, the mean, the sum of squares
  int64_t rows_a_piece, pieces;
  const Compute* grad;
  const Compute* totals;
  Storage* result;

  FUSEDREG_DEVICE const Compute* raw() const { return static_cast<const Compute*>(norm.raw); }
  FUSEDREG_DEVICE Compute gain(int64_t column) const {
    return norm_parameter<Storage>(norm.in.norm.input_weight, column, Compute(1));
  }
  FUSEDREG_DEVICE Moments<Compute> population(int64_t s, int64_t column) const {
    const RunningStatistics& running = norm.in.running;
    const int64_t given = running.input_index == nullptr ? -1 : running.input_index[s];
    const int64_t row = given < norm.running_rows ? given : norm.running_rows - 1;
    if (row < 0 || running.input_mean == nullptr) return {};
    const int64_t at = row * site.columns + column;
    return {static_cast<const Compute*>(running.input_mean)[at], static_cast<const Compute*>(running.input_var)[at],
            true};
  }
};

// Calls visit(t * B + b) for each row that step s reaches.
template <class Visit>
FUSEDREG_DEVICE void for_each_row_of_step(const LayerInputs& in, int64_t s, const Visit& visit) {
  for (int64_t b = 0; b < in.rows; ++b) {
    const int64_t length = row_length(in, b);
    if (s < length) visit(position(in, length, s) * in.rows + b);
  }
}

// A sum in groups: term() is called once for each of the rows that `each` visits.
template <class Compute>
struct GroupedSum {
  Compute total = 0, group = 0;
  int64_t terms = 0;
  FUSEDREG_DEVICE void add(Compute value) {
    group += value;
    if (++terms % kSummedInARow == 0) {
      total += group;
      group = 0;
    }
  }
  FUSEDREG_DEVICE Compute sum() const { return total + group; }
};

struct CountParams {
  LayerInputs in;
  int64_t* counts;
};

FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads,
                                       1) void count_rows_kernel(FUSEDREG_PARAMETER CountParams params) {
  const LayerInputs& in = params.in;
  const int64_t s = element_index();
  if (s > in.steps) return;
  int64_t count = 0;
  for (int64_t b = 0; b < in.rows; ++b) {
    const int64_t length = row_length(in, b);
    count += s == in.steps ? length : (s < length ? 1 : 0);
  }
  params.counts[s] = count;
}

// ---- batch norm, step by step: a thread has one column of one step ----

template <class Storage>
FUSEDREG_DEVICE bool column_of_step(const InputNormParams<Storage>& params, int64_t& s, int64_t& column) {
  const int64_t tiles = pieces(params.site.columns, kElementThreads);
  s = block_index() / tiles;
  column = block_index() % tiles * kElementThreads + thread_index();
  return column < params.site.columns;
}

template <class Storage>
Launch column_launch(const InputNormParams<Storage>& params, void* stream) {
  Launch launch = element_launch(params.site.columns, stream);
  launch.grid_x *= static_cast<int>(params.site.steps);
  return launch;
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void batch_normalize_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  int64_t s, column;
  if (!column_of_step(params, s, column)) return;
  const LayerInputs& in = params.norm.in;
  const int64_t width = params.site.columns, count = params.norm.counts[s];
  const Compute* raw = params.raw() + column;
  Moments<Compute> moments = params.population(s, column);
  if (takes_batch_statistics(in.options, count)) {
    const Compute inverse = Compute(1) / static_cast<Compute>(count);
    GroupedSum<Compute> sum, squares;
    for_each_row_of_step(in, s, [&](int64_t row) { sum.add(raw[row * width]); });
    const Compute mean = sum.sum() * inverse;
    for_each_row_of_step(in, s, [&](int64_t row) {
      const Compute difference = raw[row * width] - mean;
      squares.add(difference * difference);
    });
    moments = {mean, squares.sum() * inverse, false};
  }
  store_moments(params.norm.statistics, s, width, column, count > 0, moments);
  const Compute factor = moments.scale(in.norm_eps) * params.gain(column);
  for_each_row_of_step(in, s, [&](int64_t row) {
    params.normalised[row * width + column] = (raw[row * width] - moments.mean) * factor;
  });
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void batch_norm_backward_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  int64_t s, column;
  if (!column_of_step(params, s, column)) return;
  const LayerInputs& in = params.norm.in;
  const int64_t width = params.site.columns, count = params.norm.counts[s];
  const Compute* raw = params.raw() + column;
  const Compute* grad = params.grad + column;
  const Moments<Compute> moments = params.site.template moments<Compute>(s, s, 0, column);
  const Compute spread = moments.spread_scale(in.norm_eps);
  Compute mean = 0, slope = 0;
  if (!moments.constant) {
    const Compute inverse = Compute(1) / static_cast<Compute>(count);
    GroupedSum<Compute> sum, products;
    for_each_row_of_step(in, s, [&](int64_t row) {
      sum.add(grad[row * width]);
      products.add(grad[row * width] * ((raw[row * width] - moments.mean) * spread));
    });
    mean = sum.sum() * inverse;
    slope = products.sum() * inverse;
  }
  const Compute factor = moments.scale(in.norm_eps) * params.gain(column);
  for (int64_t b = 0; b < in.rows; ++b) {
    const int64_t length = row_length(in, b), row = position(in, length, s) * in.rows + b;
    const Compute normalised = (raw[row * width] - moments.mean) * spread;
    const Compute value = factor * (grad[row * width] - mean - normalised * slope);
    params.result[row * width + column] = narrow<Storage>(s < length ? value : Compute(0));
  }
}

// ---- batch norm over all steps together ----

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void pooled_pieces_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = params.norm.in;
  const int64_t width = params.site.columns, column = element_index();
  if (column >= width) return;
  const Compute* raw = params.raw() + column;
  const int64_t first = block_index_y() * params.rows_a_piece, all = in.steps * in.rows;
  const int64_t last = first + params.rows_a_piece < all ? first + params.rows_a_piece : all;
  const auto valid = [&](int64_t row) { return row / in.rows < row_length(in, row % in.rows); };
  int64_t count = 0;
  GroupedSum<Compute> sum, squares;
  for (int64_t row = first; row < last; ++row) {
    if (!valid(row)) continue;
    sum.add(raw[row * width]);
    ++count;
  }
  const Compute mean = count == 0 ? Compute(0) : sum.sum() / static_cast<Compute>(count);
  for (int64_t row = first; row < last; ++row) {
    if (!valid(row)) continue;
    const Compute difference = raw[row * width] - mean;
    squares.add(difference * difference);
  }
  Compute* partial = params.partial + block_index_y() * 3 * width + column;
  partial[0] = static_cast<Compute>(count);
  partial[width] = mean;
  partial[2 * width] = squares.sum();
}

// The pieces' moments become the whole's (Chan, Golub, LeVeque 1983), piece by piece.
template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void pooled_statistics_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = params.norm.in;
  const int64_t width = params.site.columns, column = element_index();
  if (column >= width) return;
  const int64_t all = params.norm.counts[in.steps];
  Moments<Compute> moments = params.population(0, column);
  if (takes_batch_statistics(in.options, all)) {
    Compute count = 0, mean = 0, squares = 0;
    for (int64_t piece = 0; piece < params.pieces; ++piece) {
      const Compute* partial = params.partial + piece * 3 * width + column;
      const Compute added = partial[0];
      if (added == 0) continue;
      const Compute difference = partial[width] - mean, share = added / (count + added);
      mean += difference * share;
      squares += partial[2 * width] + difference * difference * count * share;
      count += added;
    }
    moments = {mean, squares / count, false};
  }
  store_moments(params.norm.statistics, 0, width, column, all > 0, moments);
}

// ---- layer norm: a warp has one row ----

template <class Compute>
FUSEDREG_DEVICE Compute warp_sum(Compute value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <class Storage>
Launch row_launch(const InputNormParams<Storage>& params, void* stream) {
  return element_launch(params.site.steps * params.site.rows * 32, stream);
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void layer_normalize_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = params.norm.in;
  const int64_t row = static_cast<int64_t>(block_index()) * kWarps + warp_index(), width = params.site.columns;
  if (row >= in.steps * in.rows) return;  // warp by warp, and there is no block barrier below
  const int64_t t = row / in.rows, b = row % in.rows;
  const Compute* raw = params.raw() + row * width;
  const bool valid = t < row_length(in, b);
  Moments<Compute> moments;
  if (valid) {
    const Compute inverse = Compute(1) / static_cast<Compute>(width);
    GroupedSum<Compute> sum, squares;
    for (int64_t column = lane(); column < width; column += 32) sum.add(raw[column]);
    const Compute mean = warp_sum(sum.sum()) * inverse;
    for (int64_t column = lane(); column < width; column += 32) {
      squares.add((raw[column] - mean) * (raw[column] - mean));
    }
    moments = {mean, warp_sum(squares.sum()) * inverse, false};
  }
  if (lane() == 0) store_moments(params.norm.statistics, t, in.rows, b, valid, moments);
  if (!valid) return;
  const Compute scale = moments.scale(in.norm_eps);
  for (int64_t column = lane(); column < width; column += 32) {
    params.normalised[row * width + column] = (raw[column] - moments.mean) * scale * params.gain(column);
  }
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void layer_norm_backward_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = params.norm.in;
  const int64_t row = static_cast<int64_t>(block_index()) * kWarps + warp_index(), width = params.site.columns;
  if (row >= in.steps * in.rows) return;
  const int64_t t = row / in.rows, b = row % in.rows;
  Storage* result = params.result + row * width;
  if (t >= row_length(in, b)) {
    for (int64_t column = lane(); column < width; column += 32) result[column] = narrow<Storage>(Compute(0));
    return;
  }
  const Compute* raw = params.raw() + row * width;
  const Compute* grad = params.grad + row * width;
  const auto moments = load_moments<Compute>(params.norm.statistics, t, in.rows, b, false);
  const Compute scale = moments.scale(in.norm_eps), spread = moments.spread_scale(in.norm_eps);
  GroupedSum<Compute> sum, products;
  for (int64_t column = lane(); column < width; column += 32) {
    const Compute scaled = grad[column] * params.gain(column);
    sum.add(scaled);
    products.add(scaled * ((raw[column] - moments.mean) * spread));
  }
  const Compute inverse = Compute(1) / static_cast<Compute>(width);
  const Compute mean = warp_sum(sum.sum()) * inverse, slope = warp_sum(products.sum()) * inverse;
  for (int64_t column = lane(); column < width; column += 32) {
    const Compute normalised = (raw[column] - moments.mean) * spread;
    result[column] = narrow<Storage>(scale * (grad[column] * params.gain(column) - mean - normalised * slope));
  }
}

// ---- element by element, from statistics that are known ----

// The element that is this thread's; false in padding and past the end.
template <class Storage>
FUSEDREG_DEVICE bool own_element(const InputNormParams<Storage>& params, int64_t& at, int64_t& column, bool& valid) {
  const LayerInputs& in = params.norm.in;
  at = element_index();
  column = at % params.site.columns;
  const int64_t row = at / params.site.columns;
  if (row >= in.steps * in.rows) return false;
  valid = row / in.rows < row_length(in, row % in.rows);
  return true;
}

template <class Storage>
FUSEDREG_DEVICE Moments<ComputeOf<Storage>> moments_at(const InputNormParams<Storage>& params, int64_t at) {
  const LayerInputs& in = params.norm.in;
  const int64_t column = at % params.site.columns, row = at / params.site.columns;
  const int64_t t = row / in.rows, b = row % in.rows;
  return params.site.template moments<ComputeOf<Storage>>(step_of(in, row_length(in, b), t), t, b, column);
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void normalize_again_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  int64_t at, column;
  bool valid;
  if (!own_element(params, at, column, valid) || !valid) return;
  const auto moments = moments_at(params, at);
  params.normalised[at] =
      (params.raw()[at] - moments.mean) * moments.spread_scale(params.norm.in.norm_eps) * params.gain(column);
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void pooled_backward_kernel(
    FUSEDREG_PARAMETER InputNormParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  int64_t at, column;
  bool valid;
  if (!own_element(params, at, column, valid)) return;
  Compute value = 0;
  if (valid) {
    const LayerInputs& in = params.norm.in;
    const Moments<Compute> moments = moments_at(params, at);
    value = params.grad[at];
    if (!moments.constant) {
      const Compute inverse = Compute(1) / static_cast<Compute>(params.norm.counts[in.steps]);
      const Compute normalised = (params.raw()[at] - moments.mean) * moments.spread_scale(in.norm_eps);
      value -= params.totals[column] * inverse + normalised * (params.totals[params.site.columns + column] * inverse);
    }
    value *= moments.scale(in.norm_eps) * params.gain(column);
  }
  params.result[at] = narrow<Storage>(value);
}

template <class Storage>
InputNormParams<Storage> params_of(const InputNorm& norm) {
  InputNormParams<Storage> params{};
  params.norm = norm;
  params.site = norm_site(norm.in, /*input=*/true, 4 * norm.in.hidden_size, norm.statistics, norm.counts);
  params.rows_a_piece = piece_of(norm.in.steps * norm.in.rows, kRowsAPiece, kPieces);
  params.pieces = pieces(norm.in.steps * norm.in.rows, params.rows_a_piece);
  return params;
}

template <class Storage>
Launch all_elements(const InputNormParams<Storage>& params, void* stream) {
  return element_launch(params.site.steps * params.site.rows * params.site.columns, stream);
}

}  // namespace

void count_rows(const LayerInputs& in, int64_t* counts, void* stream) {
  launch<count_rows_kernel>(element_launch(in.steps + 1, stream), CountParams{in, counts});
}

size_t normalize_inputs_scratch(const LayerInputs& in) {
  if (!in.options.norm_input_sequence) return 0;
  const int64_t width = 4 * in.hidden_size * bytes_of(compute_type(in.dtype));
  // The pieces' moments, and the statistics themselves for those who do not want them as a result.
  return (3 * pieces(in.steps * in.rows, piece_of(in.steps * in.rows, kRowsAPiece, kPieces)) + 2) * width;
}

void normalize_inputs(const InputNorm& norm, void* normalised, void* scratch, void* stream) {
  with_storage(norm.in.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    using Compute = ComputeOf<Storage>;
    InputNormParams<Storage> params = params_of<Storage>(norm);
    params.normalised = static_cast<Compute*>(normalised);
    if (params.site.kind == NormKind::Layer) {
      launch<layer_normalize_kernel<Storage>>(row_launch(params, stream), params);
      return;
    }
    if (!params.site.pooled) {
      launch<batch_normalize_kernel<Storage>>(column_launch(params, stream), params);
      return;
    }
    params.partial = static_cast<Compute*>(scratch);
    if (norm.statistics == nullptr) {
      params.norm.statistics = params.partial + 3 * params.pieces * params.site.columns;
      params.site.statistics = params.norm.statistics;
    }
    launch<pooled_pieces_kernel<Storage>>(element_launch(params.site.columns, stream, params.pieces), params);
    launch<pooled_statistics_kernel<Storage>>(element_launch(params.site.columns, stream), params);
    launch<normalize_again_kernel<Storage>>(all_elements(params, stream), params);
  });
}

void normalize_inputs_again(const InputNorm& norm, void* normalised, void* stream) {
  with_storage(norm.in.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    InputNormParams<Storage> params = params_of<Storage>(norm);
    params.normalised = static_cast<ComputeOf<Storage>*>(normalised);
    launch<normalize_again_kernel<Storage>>(all_elements(params, stream), params);
  });
}

void input_norm_backward(const InputNorm& norm, const void* grad, const void* totals, void* result, void* stream) {
  with_storage(norm.in.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    using Compute = ComputeOf<Storage>;
    InputNormParams<Storage> params = params_of<Storage>(norm);
    params.grad = static_cast<const Compute*>(grad);
    params.totals = static_cast<const Compute*>(totals);
    params.result = static_cast<Storage*>(result);
    if (params.site.kind == NormKind::Layer) {
      launch<layer_norm_backward_kernel<Storage>>(row_launch(params, stream), params);
    } else if (params.site.pooled) {
      launch<pooled_backward_kernel<Storage>>(all_elements(params, stream), params);
    } else {
      launch<batch_norm_backward_kernel<Storage>>(column_launch(params, stream), params);
    }
  });
}

}  // namespace fusedreg::cuda
