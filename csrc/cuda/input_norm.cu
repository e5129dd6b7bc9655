#include "element_types.h"
#include "input_norm_batch.cuh"
#include "input_norm_layer.cuh"
#include "input_norm_pooled.cuh"

namespace fusedreg::cuda {
namespace {

constexpr int64_t kPieces = 512;     // into which the rows of a pooled norm are cut
constexpr int64_t kRowsAPiece = 64;  // at least

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
