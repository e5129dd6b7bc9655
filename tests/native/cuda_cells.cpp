// The device functions of csrc/cuda that need no device, as a C library: masks of cells, and the types that are stored.
#include "../../csrc/cuda/masks.cuh"
#include "../../csrc/cuda/storage.h"

namespace {

using namespace fusedreg;
using namespace fusedreg::cuda;

template <class Storage>
void narrow_all(const float* from, uint16_t* to, int64_t count) {
  for (int64_t k = 0; k < count; ++k) to[k] = narrow<Storage>(from[k]).bits;
}
template <class Storage>
void widen_all(const uint16_t* from, float* to, int64_t count) {
  for (int64_t k = 0; k < count; ++k) to[k] = widen(Storage{from[k]});
}

}  // namespace

extern "C" {

void narrow_to_bfloat16(const float* from, uint16_t* to, int64_t count) { narrow_all<BFloat16>(from, to, count); }
void narrow_to_float16(const float* from, uint16_t* to, int64_t count) { narrow_all<Float16>(from, to, count); }
void widen_bfloat16(const uint16_t* from, float* to, int64_t count) { widen_all<BFloat16>(from, to, count); }
void widen_float16(const uint16_t* from, float* to, int64_t count) { widen_all<Float16>(from, to, count); }

void keep_activations(const float* from, int16_t* to, int64_t count, bool is_tanh) {
  for (int64_t k = 0; k < count; ++k) to[k] = keep_activation<BFloat16>(from[k], is_tanh);
}
void kept_activations(const int16_t* from, float* to, int64_t count, bool is_tanh) {
  for (int64_t k = 0; k < count; ++k) to[k] = kept_activation<BFloat16>(from[k], is_tanh);
}

// Rates and options as fusedreg/ops.py encodes them. `steps` is [5][T][B][H]: update, cell, zone_hidden, zone_cell,
// output; `hidden` is [4][B][H].
void draw_masks(const double* rates, const int64_t* options, const int64_t* seed, int64_t rows_a_group, int64_t T,
                int64_t B, int64_t H, double* steps, double* hidden) {
  LayerInputs in;
  in.rates = {rates[0], rates[1], rates[2], rates[3], rates[4], rates[5], rates[6], rates[7], rates[8]};
  in.options.layer = static_cast<int32_t>(options[0]);
  in.options.reverse = options[1] != 0;
  in.options.training = options[2] != 0;
  in.options.untied_masks = options[3] != 0;
  in.options.update_mask_sequence = options[4] != 0;
  const LoopMasks<double> masks = loop_masks<double>(in);
  const MaskSeed given{seed, static_cast<uint32_t>(rows_a_group)};
  for (int64_t b = 0; b < B; ++b) {
    const MaskKey key = key_of_row(given, mask_key(given, masks.layer_direction), b);
    for (int64_t unit = 0; unit < H; ++unit) {
      const SequenceMasks<double> sequence = sequence_masks(masks, key, unit);
      for (int gate = 0; gate < 4; ++gate) hidden[(gate * B + b) * H + unit] = sequence.hidden[gate];
      for (int64_t t = 0; t < T; ++t) {
        const StepMasks<double> step = step_masks(masks, key, sequence, unit, t);
        const double values[5] = {step.update, step.cell, step.zone_hidden, step.zone_cell, step.output};
        for (int k = 0; k < 5; ++k) steps[((k * T + t) * B + b) * H + unit] = values[k];
      }
    }
  }
}

}  // extern "C"
