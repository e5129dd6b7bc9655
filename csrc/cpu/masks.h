// The regularisers' masks, a vector of them at a time, from the counter contract.
#pragma once

#include "simd.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

// A rate as the kernels use it. In evaluation nothing is drawn and every mask is `expectation`.
template <class Compute>
struct Site {
  bool drawn = false;       // a mask is drawn
  uint32_t threshold = 0;   // dropped, or zoned out, below this
  Compute kept = 1;         // what a kept element is multiplied with
  Compute dropped = 0;      // and a dropped one
  Compute expectation = 1;  // and every element, where nothing is drawn

  bool active() const { return drawn || expectation != Compute(1); }
};

// Inverted dropout: kept elements are scaled in training, nothing happens in evaluation.
template <class Compute>
FUSEDREG_INLINE Site<Compute> dropout_site(double rate, bool training) {
  Site<Compute> site;
  site.drawn = training && rate > 0;
  site.threshold = drop_threshold(rate);
  site.kept = static_cast<Compute>(1.0 / (1.0 - rate));
  return site;
}

// RNNDrop: not inverted; in evaluation the expectation, 1 - p.
template <class Compute>
FUSEDREG_INLINE Site<Compute> cell_dropout_site(double rate, bool training) {
  Site<Compute> site;
  site.drawn = training && rate > 0;
  site.threshold = drop_threshold(rate);
  if (!training) site.expectation = static_cast<Compute>(1.0 - rate);
  return site;
}

// Zoneout: the mask is zeta, 1 where the previous state is kept; in evaluation the expectation, p.
template <class Compute>
FUSEDREG_INLINE Site<Compute> zoneout_site(double rate, bool training) {
  Site<Compute> site;
  site.drawn = training && rate > 0;
  site.threshold = drop_threshold(rate);
  site.kept = 0;
  site.dropped = 1;
  site.expectation = training ? Compute(0) : static_cast<Compute>(rate);
  return site;
}

struct MaskKey {
  uint32_t low = 0, high = 0;  // the seed
  uint32_t layer_direction = 0;
};

// How the counters know a row of the batch: by its group's key, by its number in the group, and by its steps, counted
// from the group's first one.
struct MaskRow {
  MaskKey key;
  uint32_t row = 0, first_step = 0;
};

template <class Compute>
FUSEDREG_INLINE Vector<Compute> mask_of(const Site<Compute>& site, Words<Compute> words) {
  using Integers = typename VectorTypes<Compute>::Integers;
  const auto below = words < site.threshold;
  const Integers dropped = __builtin_convertvector(below, Integers);
  return dropped ? broadcast<Compute>(site.dropped) : broadcast<Compute>(site.kept);
}

template <class Compute>
struct DrawnWords {
  Words<Compute> word[4];
};

// Four vectors of words, at the counters (first, first + step ...; c1; c2; layer and direction).
template <class Compute>
static __attribute__((noinline)) DrawnWords<Compute> draw_words(const MaskKey& key, uint32_t first, uint32_t step,
                                                                uint32_t c1, uint32_t c2) {
  using Word = CounterWord<Compute>;
  const PhiloxWords<Word> drawn =
      philox4x32_10<Word>(Word::counting(first, step), Word::counting(c1, 0), Word::counting(c2, 0),
                          Word::counting(key.layer_direction, 0), key.low, key.high);
  return {{drawn.word[0].words(), drawn.word[1].words(), drawn.word[2].words(), drawn.word[3].words()}};
}

// The four words of `unit` ... `unit + width - 1` in a row of a family (c2: the step, or the family's constant).
template <class Compute>
FUSEDREG_INLINE DrawnWords<Compute> words_of_units(const MaskRow& row, int64_t unit, uint32_t c2) {
  return draw_words<Compute>(row.key, static_cast<uint32_t>(unit), 1, row.row, c2);
}

// Fills `to[0 ... padded)` with one site's mask over a whole sequence, or with its expectation.
template <class Compute>
static void fill_sequence_mask(const Site<Compute>& site, const MaskRow& row, uint32_t family, int word, int64_t padded,
                               Compute* to) {
  for (int64_t unit = 0; unit < padded; unit += kWidth<Compute>) {
    const Vector<Compute> mask = site.drawn
                                     ? mask_of<Compute>(site, words_of_units<Compute>(row, unit, family).word[word])
                                     : broadcast<Compute>(site.expectation);
    store<Compute>(to + unit, mask);
  }
}

// Weight dropout's mask of columns first ... last - 1 of one row of a 4H weight, at `to + first`. It is drawn 4 vectors
// at a time: `to` has room for 4 vectors more, and up to 4 vectors before `first` are written too, but none before
// `to`.
template <class Compute>
static void fill_weight_mask(const Site<Compute>& site, const MaskKey& key, bool by_row, int64_t row, int64_t first,
                             int64_t last, Compute* to) {
  constexpr int width = kWidth<Compute>;
  if (by_row) {
    const Vector<Compute> mask =
        mask_of<Compute>(site, draw_words<Compute>(key, 0, 0, static_cast<uint32_t>(row), kWeightFamily).word[0]);
    for (int64_t column = first; column < last; column += width) store<Compute>(to + column, mask);
    return;
  }
  for (int64_t column = first / (4 * width) * (4 * width); column < last; column += 4 * width) {
    const DrawnWords<Compute> words =
        draw_words<Compute>(key, static_cast<uint32_t>(column / 4), 1, static_cast<uint32_t>(row), kWeightFamily);
    Vector<Compute> part[4];
    for (int word = 0; word < 4; ++word) part[word] = mask_of<Compute>(site, words.word[word]);
    for (int half = 0; half < 2; ++half) {
      const Vector<Compute> even = zipped<Compute>(part[0], part[2], half == 1);
      const Vector<Compute> odd = zipped<Compute>(part[1], part[3], half == 1);
      store<Compute>(to + column + 2 * half * width, zipped<Compute>(even, odd, false));
      store<Compute>(to + column + (2 * half + 1) * width, zipped<Compute>(even, odd, true));
    }
  }
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
