// The regularisers' masks of one (row, unit), from the counter contract: pure functions of the seed and of where the
// element stands, so that every tier, and the CPU, make the same bits.
#pragma once

#include "../common/params.h"
#include "../common/philox.h"

namespace fusedreg::cuda {

// A rate as the kernels use it. Where nothing is drawn the threshold is 0 and `kept` is every element's value.
template <class Compute>
struct MaskSite {
  uint32_t threshold = 0;  // dropped, or zoned out, below this
  Compute kept = 1;
  Compute dropped = 0;
};

// Inverted dropout: kept elements are scaled in training, nothing happens in evaluation.
inline double dropout_scale(double rate, bool training) { return training ? 1.0 / (1.0 - rate) : 1.0; }

template <class Compute>
static inline MaskSite<Compute> dropout_site(double rate, bool training) {
  MaskSite<Compute> site;
  if (training) site.threshold = drop_threshold(rate);
  site.kept = static_cast<Compute>(dropout_scale(rate, training));
  return site;
}

// The same by zeros and ones, for what a product reads in the storage type: scaled there, it would be rounded once
// more, in 16 bits a larger error than all others together. The product's result, in the compute type, is scaled
// instead.
template <class Compute>
static inline MaskSite<Compute> unscaled_site(double rate, bool training) {
  MaskSite<Compute> site = dropout_site<Compute>(rate, training);
  site.kept = 1;
  return site;
}

// Of the recurrent product, there and back: its factors are h, masked by m_h, and W_hh, masked by M_w.
inline double recurrent_scale(const LayerInputs& in) {
  return dropout_scale(in.rates.hidden_dropout, in.options.training) *
         dropout_scale(in.rates.weight_dropout, in.options.training);
}

// RNNDrop: not inverted; in evaluation the expectation, 1 - p.
template <class Compute>
static inline MaskSite<Compute> cell_dropout_site(double rate, bool training) {
  MaskSite<Compute> site;
  if (training) {
    site.threshold = drop_threshold(rate);
  } else {
    site.kept = static_cast<Compute>(1.0 - rate);
  }
  return site;
}

// Zoneout: the mask is zeta, 1 where the previous state is kept; in evaluation the expectation, p.
template <class Compute>
static inline MaskSite<Compute> zoneout_site(double rate, bool training) {
  MaskSite<Compute> site;
  site.kept = 0;
  site.dropped = 1;
  if (training) {
    site.threshold = drop_threshold(rate);
  } else {
    site.kept = static_cast<Compute>(rate);
  }
  return site;
}

// The counter's fourth word.
FUSEDREG_HOST_DEVICE static inline uint32_t layer_direction(const LayerInputs& in) {
  return static_cast<uint32_t>(in.options.layer) * 2u + (in.options.reverse ? 1u : 0u);
}

// Every site that stands inside the loop, and what of it is active. Made on the host, given to kernels by value.
template <class Compute>
struct LoopMasks {
  // Of one sequence (`hidden` by zeros and ones):
  MaskSite<Compute> hidden, cell, update_sequence, output;
  // Of each step:
  MaskSite<Compute> zoneout_hidden, zoneout_cell, update_step, between_layers;
  Compute recurrent_scale = 1;  // what da W_hh and h W_hh^T are multiplied with
  uint32_t layer_direction = 0;
  bool draws_sequence = false;  // a word of the sequence family is read
  bool draws_step = false;      // a word of the step family is read
  bool drops_hidden = false;    // the recurrent product reads masked copies of h
  bool untied_hidden = false;   // four of them, each with a mask of its own
  bool zones_hidden = false;    // also in evaluation
  bool zones_cell = false;

  FUSEDREG_HOST_DEVICE int hidden_copies() const { return untied_hidden ? 4 : 1; }
};

template <class Compute>
static inline LoopMasks<Compute> loop_masks(const LayerInputs& in) {
  const Rates& rates = in.rates;
  const Options& options = in.options;
  const bool training = options.training;
  LoopMasks<Compute> masks;
  masks.hidden = unscaled_site<Compute>(rates.hidden_dropout, training);
  masks.recurrent_scale = static_cast<Compute>(recurrent_scale(in));
  masks.cell = cell_dropout_site<Compute>(rates.cell_dropout, training);
  masks.output = dropout_site<Compute>(rates.output_dropout, training);
  masks.between_layers = dropout_site<Compute>(rates.dropout, training);
  masks.zoneout_hidden = zoneout_site<Compute>(rates.zoneout_hidden, training);
  masks.zoneout_cell = zoneout_site<Compute>(rates.zoneout_cell, training);
  (options.update_mask_sequence ? masks.update_sequence : masks.update_step) =
      dropout_site<Compute>(rates.update_dropout, training);
  masks.layer_direction = layer_direction(in);
  masks.drops_hidden = training && rates.hidden_dropout > 0;
  masks.untied_hidden = masks.drops_hidden && options.untied_masks;
  const bool update = rates.update_dropout > 0;
  masks.draws_sequence = training && ((masks.drops_hidden && !masks.untied_hidden) || rates.cell_dropout > 0 ||
                                      rates.output_dropout > 0 || (update && options.update_mask_sequence));
  masks.draws_step = training && (rates.zoneout_hidden > 0 || rates.zoneout_cell > 0 || rates.dropout > 0 ||
                                  (update && !options.update_mask_sequence));
  masks.zones_hidden = rates.zoneout_hidden > 0;
  masks.zones_cell = rates.zoneout_cell > 0;
  return masks;
}

// Where the masks of a call come from, on the device: one seed for all rows, or a pair (seed, first step) for each
// group of consecutive rows.
struct MaskSeed {
  const int64_t* values = nullptr;  // null where nothing is drawn
  uint32_t rows_a_group = 0;        // of pairs; 0: one seed
};

// The key of what is drawn for one row, and how the counters name that row and its first step.
struct MaskKey {
  uint32_t low = 0, high = 0;  // the seed
  uint32_t layer_direction = 0;
  uint32_t row = 0, first_step = 0;
};

// Reads the seed where it lives, on the device: a captured graph draws fresh masks when it is replayed. Of pairs it is
// the first group's: that of weights, and what key_of_row() replaces.
FUSEDREG_HOST_DEVICE static inline MaskKey mask_key(const MaskSeed& seed, uint32_t layer_direction) {
  const uint64_t value = seed.values == nullptr ? 0 : static_cast<uint64_t>(*seed.values);
  return {static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32), layer_direction};
}

// Row b's, from mask_key().
FUSEDREG_HOST_DEVICE static inline MaskKey key_of_row(const MaskSeed& seed, MaskKey key, int64_t b) {
  key.row = static_cast<uint32_t>(b);
  if (seed.rows_a_group == 0 || seed.values == nullptr) return key;
  const uint32_t group = key.row / seed.rows_a_group;
  const int64_t* const pair = seed.values + int64_t{2} * group;
  const uint64_t value = static_cast<uint64_t>(pair[0]);
  key.low = static_cast<uint32_t>(value);
  key.high = static_cast<uint32_t>(value >> 32);
  key.row -= group * seed.rows_a_group;
  key.first_step = static_cast<uint32_t>(pair[1]);
  return key;
}

// The four words of a unit in the key's row of a family (c2: the step, or the family's constant).
FUSEDREG_HOST_DEVICE static inline PhiloxWords<uint32_t> words_of(const MaskKey& key, int64_t unit, uint32_t c2) {
  return philox4x32_10<uint32_t>(static_cast<uint32_t>(unit), key.row, c2, key.layer_direction, key.low, key.high);
}
// Of step t: the position in the input, not the index of the step.
FUSEDREG_HOST_DEVICE static inline PhiloxWords<uint32_t> words_of_step(const MaskKey& key, int64_t unit, int64_t t) {
  return words_of(key, unit, static_cast<uint32_t>(t) + key.first_step);
}

// Word `index`, which is known only when the program runs: as an index it would put the words into local memory.
FUSEDREG_HOST_DEVICE static inline uint32_t chosen_word(const PhiloxWords<uint32_t>& words, int index) {
  return index == 0 ? words.word[0] : index == 1 ? words.word[1] : index == 2 ? words.word[2] : words.word[3];
}

template <class Compute>
FUSEDREG_HOST_DEVICE static inline Compute mask_of(const MaskSite<Compute>& site, uint32_t word) {
  return word < site.threshold ? site.dropped : site.kept;
}

// What one (row, unit) keeps for a whole sequence.
template <class Compute>
struct SequenceMasks {
  Compute hidden[4];  // of the copies of h that the gates read; tied: four times the same
  Compute update, cell, output;
};

template <class Compute>
FUSEDREG_HOST_DEVICE static inline SequenceMasks<Compute> sequence_masks(const LoopMasks<Compute>& masks,
                                                                         const MaskKey& key, int64_t unit) {
  PhiloxWords<uint32_t> words{};
  if (masks.draws_sequence) words = words_of(key, unit, kSequenceFamily);
  SequenceMasks<Compute> result;
  result.update = mask_of(masks.update_sequence, words.word[kUpdateSequence]);
  result.cell = mask_of(masks.cell, words.word[kCell]);
  result.output = mask_of(masks.output, words.word[kOutput]);
  for (int gate = 0; gate < 4; ++gate) result.hidden[gate] = mask_of(masks.hidden, words.word[kHiddenTied]);
  if (masks.untied_hidden) {
    words = words_of(key, unit, kUntiedHiddenFamily);
    for (int gate = 0; gate < 4; ++gate) result.hidden[gate] = mask_of(masks.hidden, words.word[gate]);
  }
  return result;
}

// What a cell needs at one step.
template <class Compute>
struct StepMasks {
  Compute update, cell, zone_hidden, zone_cell;
  Compute output;  // output dropout times dropout between layers
};

// t is the position in the input, not the index of the step.
template <class Compute>
FUSEDREG_HOST_DEVICE static inline StepMasks<Compute> step_masks(const LoopMasks<Compute>& masks, const MaskKey& key,
                                                                 const SequenceMasks<Compute>& sequence, int64_t unit,
                                                                 int64_t t) {
  PhiloxWords<uint32_t> words{};
  if (masks.draws_step) words = words_of_step(key, unit, t);
  StepMasks<Compute> result;
  result.update = sequence.update * mask_of(masks.update_step, words.word[kUpdateStep]);  // one of the two is 1
  result.cell = sequence.cell;
  result.zone_hidden = mask_of(masks.zoneout_hidden, words.word[kZoneoutHidden]);
  result.zone_cell = mask_of(masks.zoneout_cell, words.word[kZoneoutCell]);
  result.output = sequence.output * mask_of(masks.between_layers, words.word[kBetweenLayers]);
  return result;
}

}  // namespace fusedreg::cuda
