#include "before_loop.h"

#include "cell_step.cuh"
#include "element_types.h"
#include "elementwise.h"
#include "masks.cuh"
#include "row_groups.h"

namespace fusedreg::cuda {
namespace {

constexpr int64_t kStepsAThread = 16;  // one draw serves them all
constexpr int64_t kLargestGridY = 32768;

// ---- weights ----

template <class Storage>
struct WeightParams {
  MaskSeed seed;
  uint32_t layer_direction;
  MaskSite<ComputeOf<Storage>> site;
  bool by_row;
  ComputeOf<Storage> scale;
  const void* from;
  Storage* to;
  int64_t rows, columns;  // of all groups together
  int64_t weight_rows;    // of one of them
};

// A thread has four columns of one row: one call of the generator.
template <class Storage, class From>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads,
                                       1) void mask_weight_kernel(FUSEDREG_PARAMETER WeightParams<Storage> params) {
  const int64_t quads = (params.columns + 3) / 4, at = element_index();
  if (at >= params.rows * quads) return;
  const int64_t row = at / quads, quad = at % quads;
  PhiloxWords<uint32_t> words{};
  if (params.site.threshold > 0) {
    MaskKey key = mask_key(params.seed, params.layer_direction);
    key.row = static_cast<uint32_t>(row % params.weight_rows);
    words = words_of(key, params.by_row ? 0 : quad, kWeightFamily);
  }
  for (int64_t k = 0; k < 4 && quad * 4 + k < params.columns; ++k) {
    const int64_t element = row * params.columns + quad * 4 + k;
    const auto mask = mask_of(params.site, chosen_word(words, params.by_row ? 0 : static_cast<int>(k)));
    params.to[element] = narrow<Storage>(widen(static_cast<const From*>(params.from)[element]) * (mask * params.scale));
  }
}

template <class Storage>
struct ScaleParams {
  const ComputeOf<Storage>* from;
  Storage* to;
  ComputeOf<Storage> scale;
  int64_t elements;
};

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads,
                                       1) void scale_kernel(FUSEDREG_PARAMETER ScaleParams<Storage> params) {
  const int64_t at = element_index();
  if (at < params.elements) params.to[at] = narrow<Storage>(params.from[at] * params.scale);
}

// ---- inputs ----

template <class Storage>
struct InputParams {
  LayerInputs in;
  MaskSeed seed;
  MaskSite<ComputeOf<Storage>> site;
  int gate;
  int64_t groups;
  int64_t steps_a_thread;
  const ComputeOf<Storage>* grad;  // on the way back
  ComputeOf<Storage>* sum;
  Storage* to;

  FUSEDREG_DEVICE ComputeOf<Storage> mask(int64_t b, int64_t feature) const {
    if (site.threshold == 0) return site.kept;
    const MaskKey key = key_of_row(seed, mask_key(seed, layer_direction(in)), b);
    const bool untied = in.options.untied_masks;
    const auto words = words_of(key, feature, untied ? kUntiedInputFamily : kInputFamily);
    return mask_of(site, chosen_word(words, untied ? gate : 0));
  }
};

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads,
                                       1) void gather_inputs_kernel(FUSEDREG_PARAMETER InputParams<Storage> params) {
  const LayerInputs& in = params.in;
  const int64_t at = element_index(), row_elements = in.rows * in.input_size;
  if (at >= row_elements) return;
  const int64_t b = at / in.input_size, feature = at % in.input_size, length = row_length(in, b);
  const auto mask = params.mask(b, feature);
  const Storage* from = static_cast<const Storage*>(in.input) + b * in.input_row_stride + feature;
  const GroupedRow place = grouped_row(in, params.groups, b);
  const int64_t first = block_index_y() * params.steps_a_thread;
  for (int64_t t = first; t < first + params.steps_a_thread && t < in.steps; ++t) {
    params.to[place.at(t) * in.input_size + feature] =
        t < length ? narrow<Storage>(widen(from[t * in.input_step_stride]) * mask)
                   : narrow<Storage>(ComputeOf<Storage>(0));
  }
}

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads, 1) void mask_input_gradient_kernel(
    FUSEDREG_PARAMETER InputParams<Storage> params) {
  using Compute = ComputeOf<Storage>;
  const LayerInputs& in = params.in;
  const int64_t at = element_index(), row_elements = in.rows * in.input_size;
  if (at >= row_elements) return;
  const Compute mask = params.mask(at / in.input_size, at % in.input_size);
  const int64_t first = block_index_y() * params.steps_a_thread;
  for (int64_t t = first; t < first + params.steps_a_thread && t < in.steps; ++t) {
    const int64_t element = t * row_elements + at;
    Compute value = params.grad[element] * mask;
    if (params.sum != nullptr) {
      if (params.gate > 0) value += params.sum[element];
      params.sum[element] = value;
    }
    if (params.to != nullptr) params.to[element] = narrow<Storage>(value);
  }
}

template <class Storage>
InputParams<Storage> input_params(const LayerInputs& in, const MaskSeed& seed, int gate) {
  InputParams<Storage> params{};
  params.in = in;
  params.seed = seed;
  params.site = dropout_site<ComputeOf<Storage>>(in.rates.input_dropout, in.options.training);
  params.gate = gate;
  params.steps_a_thread = piece_of(in.steps, kStepsAThread, kLargestGridY);
  return params;
}

template <class Storage>
Launch input_launch(const InputParams<Storage>& params, void* stream) {
  return element_launch(params.in.rows * params.in.input_size, stream, pieces(params.in.steps, params.steps_a_thread));
}

// ---- biases ----

template <class Storage>
struct BiasParams {
  const void* terms[4];
  ComputeOf<Storage>* to;
  int64_t elements;
};

template <class Storage>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kElementThreads,
                                       1) void sum_biases_kernel(FUSEDREG_PARAMETER BiasParams<Storage> params) {
  const int64_t at = element_index();
  if (at >= params.elements) return;
  ComputeOf<Storage> sum = 0;
  for (const void* term : params.terms) {
    if (term != nullptr) sum += widen(static_cast<const Storage*>(term)[at]);
  }
  params.to[at] = sum;
}

template <class Storage, class From>
void run_mask_weight(const LayerInputs& in, const MaskSeed& seed, const void* from, double scale, int64_t groups,
                     void* to, void* stream) {
  WeightParams<Storage> params{};
  params.seed = seed;
  params.layer_direction = layer_direction(in);
  params.site = unscaled_site<ComputeOf<Storage>>(in.rates.weight_dropout, in.options.training);
  params.by_row = in.options.weight_mask_row;
  params.scale = static_cast<ComputeOf<Storage>>(scale);
  params.from = from;
  params.to = static_cast<Storage*>(to);
  params.weight_rows = 4 * in.hidden_size;
  params.rows = groups * params.weight_rows;
  params.columns = in.projected_size;
  launch<mask_weight_kernel<Storage, From>>(element_launch(params.rows * pieces(params.columns, 4), stream), params);
}

}  // namespace

bool drops_weight(const LayerInputs& in) { return in.options.training && in.rates.weight_dropout > 0; }

void mask_weight(const LayerInputs& in, const MaskSeed& seed, void* to, void* stream) {
  with_storage(in.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    run_mask_weight<Storage, Storage>(in, seed, in.weight_hh, 1, 1, to, stream);
  });
}

void mask_weight_gradient(const LayerInputs& in, const MaskSeed& seed, const void* grad, double scale, int64_t groups,
                          void* to, void* stream) {
  with_storage(in.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    run_mask_weight<Storage, ComputeOf<Storage>>(in, seed, grad, scale, groups, to, stream);
  });
}

void scale_elements(ScalarType storage_type, const void* from, double scale, int64_t elements, void* to, void* stream) {
  with_storage(storage_type, [&](auto storage) {
    using Storage = decltype(storage);
    using Compute = ComputeOf<Storage>;
    ScaleParams<Storage> params{static_cast<const Compute*>(from), static_cast<Storage*>(to),
                                static_cast<Compute>(scale), elements};
    launch<scale_kernel<Storage>>(element_launch(elements, stream), params);
  });
}

double input_scale(const LayerInputs& in) {
  return is_narrow(in.dtype) ? dropout_scale(in.rates.input_dropout, in.options.training) : 1.0;
}

bool drops_inputs(const LayerInputs& in) { return in.options.training && in.rates.input_dropout > 0; }

void gather_inputs(const LayerInputs& in, const MaskSeed& seed, int gate, int64_t groups, void* to, void* stream) {
  with_storage(in.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    InputParams<Storage> params = input_params<Storage>(in, seed, gate);
    if (is_narrow(in.dtype)) params.site.kept = 1;
    params.groups = groups;
    params.to = static_cast<Storage*>(to);
    launch<gather_inputs_kernel<Storage>>(input_launch(params, stream), params);
  });
}

void mask_input_gradient(const LayerInputs& in, const MaskSeed& seed, int gate, const void* grad, void* sum, void* to,
                         void* stream) {
  with_storage(in.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    InputParams<Storage> params = input_params<Storage>(in, seed, gate);
    params.grad = static_cast<const ComputeOf<Storage>*>(grad);
    params.sum = static_cast<ComputeOf<Storage>*>(sum);
    params.to = static_cast<Storage*>(to);
    launch<mask_input_gradient_kernel<Storage>>(input_launch(params, stream), params);
  });
}

void sum_biases(const LayerInputs& in, void* to, void* stream) {
  with_storage(in.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    BiasParams<Storage> params{{in.bias_ih, in.bias_hh, in.norm.input_bias, in.norm.recurrent_bias},
                               static_cast<ComputeOf<Storage>*>(to),
                               4 * in.hidden_size};
    launch<sum_biases_kernel<Storage>>(element_launch(params.elements, stream), params);
  });
}

}  // namespace fusedreg::cuda
