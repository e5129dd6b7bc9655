// The masks of one cell in 16 bits, and what its row does at this step: the persistent forward keeps them for every
// cell of a block in shared memory, drawn before they are needed.
#pragma once

#include "device.h"
#include "masks.cuh"

namespace fusedreg::cuda {

// Of the whole sequence; the first four are the hidden masks of the gates (tied: four times the same).
constexpr uint32_t kHiddenDropped = 1u << 0;
constexpr uint32_t kUpdateSequenceDropped = 1u << 4;
constexpr uint32_t kCellDropped = 1u << 5;
constexpr uint32_t kOutputDropped = 1u << 6;
constexpr uint32_t kSequenceBits = 0xffu;
// Of one step.
constexpr uint32_t kHiddenZoned = 1u << 8;
constexpr uint32_t kCellZoned = 1u << 9;
constexpr uint32_t kUpdateStepDropped = 1u << 10;
constexpr uint32_t kBetweenLayersDropped = 1u << 11;
constexpr uint32_t kRuns = 1u << 12;                // the row takes part in this step
constexpr uint32_t kBeginsFromZero = 1u << 13;      // this step begins from zero
constexpr uint32_t kNextBeginsFromZero = 1u << 14;  // the next one does

FUSEDREG_DEVICE uint32_t dropped_bit(const MaskSite<float>& site, uint32_t word, uint32_t bit) {
  return word < site.threshold ? bit : 0u;
}
FUSEDREG_DEVICE float unpacked(const MaskSite<float>& site, uint32_t bits, uint32_t bit) {
  return (bits & bit) != 0 ? site.dropped : site.kept;
}

FUSEDREG_DEVICE uint32_t packed_sequence_masks(const LoopMasks<float>& masks, const MaskKey& key, int64_t unit) {
  PhiloxWords<uint32_t> words{};
  if (masks.draws_sequence) words = words_of(key, unit, kSequenceFamily);
  uint32_t bits = dropped_bit(masks.update_sequence, words.word[kUpdateSequence], kUpdateSequenceDropped) |
                  dropped_bit(masks.cell, words.word[kCell], kCellDropped) |
                  dropped_bit(masks.output, words.word[kOutput], kOutputDropped);
  if (masks.untied_hidden) {
    words = words_of(key, unit, kUntiedHiddenFamily);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) bits |= dropped_bit(masks.hidden, words.word[gate], kHiddenDropped << gate);
  } else {
    bits |= dropped_bit(masks.hidden, words.word[kHiddenTied], 15u * kHiddenDropped);
  }
  return bits;
}

// t is the position in the input.
FUSEDREG_DEVICE uint32_t packed_step_masks(const LoopMasks<float>& masks, const MaskKey& key, int64_t unit, int64_t t) {
  if (!masks.draws_step) return 0;
  const PhiloxWords<uint32_t> words = words_of_step(key, unit, t);
  return dropped_bit(masks.zoneout_hidden, words.word[kZoneoutHidden], kHiddenZoned) |
         dropped_bit(masks.zoneout_cell, words.word[kZoneoutCell], kCellZoned) |
         dropped_bit(masks.update_step, words.word[kUpdateStep], kUpdateStepDropped) |
         dropped_bit(masks.between_layers, words.word[kBetweenLayers], kBetweenLayersDropped);
}

FUSEDREG_DEVICE StepMasks<float> unpacked_step_masks(const LoopMasks<float>& masks, uint32_t bits) {
  StepMasks<float> result;
  result.update = unpacked(masks.update_sequence, bits, kUpdateSequenceDropped) *
                  unpacked(masks.update_step, bits, kUpdateStepDropped);  // one of the two is 1
  result.cell = unpacked(masks.cell, bits, kCellDropped);
  result.zone_hidden = unpacked(masks.zoneout_hidden, bits, kHiddenZoned);
  result.zone_cell = unpacked(masks.zoneout_cell, bits, kCellZoned);
  result.output =
      unpacked(masks.output, bits, kOutputDropped) * unpacked(masks.between_layers, bits, kBetweenLayersDropped);
  return result;
}

FUSEDREG_DEVICE float unpacked_hidden_mask(const LoopMasks<float>& masks, uint32_t bits, int gate) {
  return unpacked(masks.hidden, bits, kHiddenDropped << gate);
}

}  // namespace fusedreg::cuda
