// What a call is about to do: sizes, the order of the rows, the chunks of steps, the division of labour.
//
// Rows are sorted by length, longest first, so that the rows still running at a step are the first ones, and padding
// is never touched. A row's place in that order is its rank. The (step, rank) pairs that exist, step by step, are
// numbered through: `Plan::first[s] + rank`. Nothing here depends on the number of threads but Share.
#pragma once

#include "../common/params.h"
#include "lstm_layer.h"
#include "masks.h"
#include "team.h"
#include "workspace.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

// Who does what in the loop. Rows: a worker runs all units of some rows and meets nobody. Units: a worker runs some
// units of all rows, keeps its part of W_hh in its own cache, and exchanges h at a barrier each step.
enum class Division { Rows, Units };

// Hands out parts of one buffer; a first pass with no buffer measures it.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    // A cache line more than asked: arrays of equal power-of-two sizes must not all start at the same cache set.
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64 + 64;
    T* part = reinterpret_cast<T*>(base_ + used_);
    used_ += bytes;
    return base_ == nullptr ? nullptr : part;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Share {
  int worker, workers;
  int64_t first_rank, rank_step;            // of the rows it runs
  int64_t first_unit, last_unit;            // of the units it runs: whole vectors
  int64_t first_projected, last_projected;  // of the units of h, which are the same without a projection
};

FUSEDREG_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDREG_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FUSEDREG_INLINE int64_t rounded_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
// Part `worker` of `count` in units of `grain`.
FUSEDREG_INLINE void split(int64_t count, int64_t grain, int worker, int workers, int64_t& first, int64_t& last) {
  const int64_t grains = (count + grain - 1) / grain;
  first = smaller(grains * worker / workers * grain, count);
  last = smaller(grains * (worker + 1) / workers * grain, count);
}

template <class Storage>
struct Plan {
  using Compute = ComputeOf<Storage>;
  static constexpr int width = kWidth<Compute>;

  const LayerInputs& in;
  int64_t T, B, I, H, P;
  bool projected;         // h is a projection of o tanh(c): P units, and W_hr
  int64_t padded_hidden;  // H in whole vectors: the distance between gates in scratch rows
  int64_t padded_projected;
  int64_t padded_input;
  int64_t hidden_stride;  // between scratch rows of H: padded so that rows do not share a cache set
  int64_t projected_stride;
  int64_t input_stride;
  int64_t gate_stride;  // between scratch rows of 4H
  int64_t steps_per_chunk;
  int64_t largest_chunk;  // (step, rank) pairs
  int64_t longest;        // steps of the longest row
  Division division;
  int asked;  // workers

  // Sites of the masks.
  Site<Compute> dropout, input_dropout, hidden_dropout, output_dropout, update_dropout, cell_dropout, weight_dropout,
      zoneout_hidden, zoneout_cell;
  MaskKey key;      // of the weights' mask, and of all others where they are not grouped
  bool step_words;  // some mask is drawn at each step
  bool untied_input, untied_hidden;
  bool output_is_hidden;  // y is the carried h itself
  bool has_norm;
  bool batch_statistics;  // batch norm takes its statistics from the batch
  bool few_pairs;         // so few rows that packing a weight costs more than it brings
  bool grouped_masks;     // rows are not counted in the masks as they are in the batch
  int64_t groups;         // of rows whose gradients of the parameters are wanted apart; 1: all together

  // Tables, filled by `prepare`.
  MaskRow* mask_rows = nullptr;      // rank -> its masks' coordinates, where they are grouped
  int64_t* group_ranks = nullptr;    // [group][longest first] -> rank, where there are groups
  int64_t* ranks_grouped = nullptr;  // group -> how many of its ranks have been found, while `prepare` runs
  int64_t* order;                    // rank -> row of the caller
  int64_t* length;                   // rank -> length
  int64_t* running;                  // s -> rows running
  int64_t* first;                    // s -> number of (step, rank) pairs before s; T + 1 entries

  Plan(const LayerInputs& inputs, int threads) : in(inputs) {
    const Options& options = in.options;
    T = in.steps, B = in.rows, I = in.input_size, H = in.hidden_size, P = in.projected_size;
    projected = in.weight_hr != nullptr;
    padded_hidden = rounded_up(H, width);
    padded_projected = rounded_up(P, width);
    padded_input = rounded_up(I, width);
    hidden_stride = padded_hidden + width;
    projected_stride = padded_projected + width;
    input_stride = padded_input + width;
    gate_stride = 4 * padded_hidden + width;

    const bool training = options.training;
    const Rates& rates = in.rates;
    dropout = dropout_site<Compute>(rates.dropout, training);
    input_dropout = dropout_site<Compute>(rates.input_dropout, training);
    hidden_dropout = dropout_site<Compute>(rates.hidden_dropout, training);
    output_dropout = dropout_site<Compute>(rates.output_dropout, training);
    update_dropout = dropout_site<Compute>(rates.update_dropout, training);
    cell_dropout = cell_dropout_site<Compute>(rates.cell_dropout, training);
    weight_dropout = dropout_site<Compute>(rates.weight_dropout, training);
    zoneout_hidden = zoneout_site<Compute>(rates.zoneout_hidden, training);
    zoneout_cell = zoneout_site<Compute>(rates.zoneout_cell, training);
    if (!zoneout_hidden.drawn && rates.zoneout_hidden == 0) zoneout_hidden.expectation = 0;
    if (!zoneout_cell.drawn && rates.zoneout_cell == 0) zoneout_cell.expectation = 0;
    key = key_of(in.seeds == nullptr ? 0 : in.seeds[0]);
    step_words = zoneout_hidden.drawn || zoneout_cell.drawn || dropout.drawn ||
                 (update_dropout.drawn && !options.update_mask_sequence);
    untied_input = options.untied_masks && input_dropout.drawn;
    untied_hidden = options.untied_masks && hidden_dropout.drawn;
    has_norm = options.norm != NormKind::None;
    batch_statistics = options.norm == NormKind::Batch && training;
    output_is_hidden = !dropout.drawn && !output_dropout.drawn && !(options.zoneout_candidate && zones_hidden());

    few_pairs = T * B <= kFewPairs;
    grouped_masks = in.seeds != nullptr && (in.groups > 1 || in.seeds[1] != 0);
    groups = options.gradient_groups > 1 ? options.gradient_groups : 1;

    // Pairs a chunk: enough for the products before and after the loop to run at a product's rate, few enough for
    // what they exchange with the loop to stay in cache. One chunk where a statistic runs over the whole sequence.
    const bool whole = batch_statistics && options.norm_input && options.norm_input_sequence;
    // Groups have products of their own, so a chunk is to bring each of them as many pairs, within bounds.
    const int64_t chunk_pairs = smaller(kChunkPairs * groups, kGroupedChunkPairs);
    steps_per_chunk = whole ? larger(T, 1) : smaller(larger(1, chunk_pairs / larger(B, 1)), larger(T, 1));
    largest_chunk = steps_per_chunk * B;

    choose_division(threads);
  }

  bool zones_hidden() const { return in.rates.zoneout_hidden > 0; }
  bool zones_cell() const { return in.rates.zoneout_cell > 0; }

  void take_tables(Arena& arena) {
    order = arena.take<int64_t>(B);
    length = arena.take<int64_t>(B);
    running = arena.take<int64_t>(T);
    first = arena.take<int64_t>(T + 1);
    if (grouped_masks) mask_rows = arena.take<MaskRow>(B);
    if (groups > 1) {
      group_ranks = arena.take<int64_t>(B);
      ranks_grouped = arena.take<int64_t>(groups);
    }
  }

  // Fills the tables. Sorting is by counting and keeps the callers' order among equals.
  void prepare() {
    for (int64_t s = 0; s < T; ++s) running[s] = 0;
    for (int64_t b = 0; b < B; ++b) {
      const int64_t steps = length_of(b);
      if (steps > 0) ++running[steps - 1];
    }
    longest = 0;
    int64_t after = 0;
    for (int64_t s = T - 1; s >= 0; --s) {  // rows of length s + 1 -> rows running at s
      after += running[s];
      running[s] = after;
      if (after > 0 && longest == 0) longest = s + 1;
    }
    // Rank of the next row of length n: `first` serves as the counter; rows longer than n stand before it.
    for (int64_t n = 0; n <= T; ++n) first[n] = n < T ? running[n] : 0;
    for (int64_t b = 0; b < B; ++b) {
      const int64_t steps = length_of(b);
      const int64_t rank = first[steps]++;
      order[rank] = b;
      length[rank] = steps;
    }
    first[0] = 0;
    for (int64_t s = 0; s < T; ++s) first[s + 1] = first[s] + running[s];
    if (grouped_masks) fill_mask_rows();
    if (groups > 1) fill_group_ranks();
  }

  int64_t length_of(int64_t b) const {
    if (in.lengths == nullptr) return T;
    const int64_t given = in.lengths[b];
    return given < 0 ? 0 : given > T ? T : given;
  }

  int64_t position(int64_t rank, int64_t s) const { return in.options.reverse ? length[rank] - 1 - s : s; }
  bool reset_at(int64_t rank, int64_t s) const {
    return in.reset != nullptr && in.reset[position(rank, s) * B + order[rank]];
  }

  MaskRow mask_row(int64_t rank) const {
    return mask_rows == nullptr ? MaskRow{key, static_cast<uint32_t>(order[rank]), 0} : mask_rows[rank];
  }
  int64_t rows_of_group() const { return B / groups; }
  int64_t group_of(int64_t b) const { return b / rows_of_group(); }

  Share share(int worker, int workers) const {
    Share share{worker, workers, 0, 1, 0, padded_hidden, 0, padded_projected};
    if (division == Division::Rows) {
      share.first_rank = worker;  // every so-manyth, so that long and short rows are shared alike
      share.rank_step = workers;
    } else {
      split(padded_hidden, width, worker, workers, share.first_unit, share.last_unit);
      split(padded_projected, width, worker, workers, share.first_projected, share.last_projected);
    }
    return share;
  }

  // Of the rows running at s, how many are this worker's.
  int64_t rows_running(const Share& share, int64_t s) const {
    const int64_t rows = running[s] - share.first_rank;
    return rows <= 0 ? 0 : (rows + share.rank_step - 1) / share.rank_step;
  }

 private:
  static constexpr int64_t kChunkPairs = 512;
  static constexpr int64_t kGroupedChunkPairs = 16384;
  static constexpr int64_t kFewPairs = 32;

  void fill_mask_rows() const {
    const int64_t rows = B / in.groups;
    for (int64_t rank = 0; rank < B; ++rank) {
      const int64_t* of_group = in.seeds + order[rank] / rows * 2;
      mask_rows[rank] = {key_of(of_group[0]), static_cast<uint32_t>(order[rank] % rows),
                         static_cast<uint32_t>(of_group[1])};
    }
  }

  void fill_group_ranks() const {
    for (int64_t group = 0; group < groups; ++group) ranks_grouped[group] = 0;
    for (int64_t rank = 0; rank < B; ++rank) {
      const int64_t group = group_of(order[rank]);
      group_ranks[group * rows_of_group() + ranks_grouped[group]++] = rank;
    }
  }

  MaskKey key_of(int64_t seed) const {
    const uint64_t bits = static_cast<uint64_t>(seed);
    return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32),
            static_cast<uint32_t>(in.options.layer) * 2u + (in.options.reverse ? 1u : 0u)};
  }

  void choose_division(int threads) {
    int64_t workers = workers_worth_having(operations_of(in), threads);
    const int64_t units = padded_hidden / width;
    switch (in.options.norm) {
      case NormKind::Batch: division = Division::Units; break;  // a unit's statistics need all its rows
      case NormKind::Layer: division = Division::Rows; break;   // a row's need all its units
      default: {
        const bool few_rows = B < 2 * kTileRows * workers;
        division = (few_rows || H > 768) && units >= workers ? Division::Units : Division::Rows;
      }
    }
    workers = smaller(workers, division == Division::Rows ? larger(B, 1) : units);
    asked = static_cast<int>(workers);
  }
};

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
