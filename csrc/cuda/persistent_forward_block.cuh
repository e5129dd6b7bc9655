// One block of the persistent forward: which units and rows are its own, and where their values stand.
#pragma once

#include "cell_step.cuh"
#include "moments.cuh"
#include "persistent_forward_shape.h"

namespace fusedreg::cuda {

// What can be reckoned beforehand is, so that the kernel finds it among its parameters and keeps no register for it.
struct PersistentForwardParams {
  ForwardLoop loop;
  LoopMasks<float> masks;
  ForwardShape shape;
  ForwardRoom room;
  ExchangeLayout exchange;
  int chunks, most_chunks, working_warps;  // as the functions of `shape`
};

// A cell's place in a block's tables.
template <int U>
struct ForwardCell {
  int row;   // of the tile
  int unit;  // of the block
  FUSEDREG_DEVICE int index() const { return row * U + unit; }
  FUSEDREG_DEVICE int gate(int k) const { return row * 5 * U + k * U + unit; }  // ForwardShape::gate_stride
};

template <int U>
struct ForwardBlock {
  using Cell = ForwardCell<U>;
  static constexpr int kGateStride = 5 * U;
  static constexpr int kRowStep = kProductThreads / U;  // between the rows of one thread's cells
  static_assert(kProductThreads % U == 0, "a thread's cells are of one unit");

  const PersistentForwardParams& params;
  char* shared;
  MaskKey key;        // of no row in particular
  int64_t first_row;  // of the tile
  int rows;           // of the tile
  int own_block;      // among those that share out the units
  int first_unit;     // of the block
  int units;          // of the block, that exist
  int own_unit;       // of this thread's cells, within the block
  int longest = 0;    // steps of the tile's longest row
  int count = 0;      // rows of the tile that take part in the step; batch norm alone reads it

  FUSEDREG_DEVICE explicit ForwardBlock(const PersistentForwardParams& given)
      : params(given),
        shared(dynamic_shared()),
        key(mask_key(given.loop.layer.seed, given.masks.layer_direction)),
        first_row(static_cast<int64_t>(block_index() / given.shape.blocks) * given.shape.rows),
        own_block(block_index() % given.shape.blocks) {
    const int64_t left = given.loop.layer.in.rows - first_row;
    rows = left < given.shape.rows ? static_cast<int>(left) : given.shape.rows;
    first_unit = own_block * U;
    units = given.shape.hidden_size - first_unit < U ? given.shape.hidden_size - first_unit : U;
  }

  // The masks' key of a row of the batch.
  FUSEDREG_DEVICE MaskKey row_key(int64_t b) const { return key_of_row(params.loop.layer.seed, key, b); }

  // The cell's unit of the layer, and its row of the batch.
  FUSEDREG_DEVICE int64_t unit(const Cell& cell) const { return first_unit + cell.unit; }
  FUSEDREG_DEVICE int64_t batch_row(const Cell& cell) const { return first_row + cell.row; }

  FUSEDREG_DEVICE float* hidden() const { return params.room.hidden.in(shared); }
  FUSEDREG_DEVICE float* cell() const { return params.room.cell.in(shared); }
  FUSEDREG_DEVICE float* gates() const { return params.room.gates.in(shared); }
  FUSEDREG_DEVICE float* raw() const { return params.room.raw.in(shared); }
  FUSEDREG_DEVICE float* candidates() const { return params.room.candidates.in(shared); }
  FUSEDREG_DEVICE uint16_t* masks() const { return params.room.masks.in(shared); }
  FUSEDREG_DEVICE float* gate_constants() const { return params.room.gate_constants.in(shared); }
  FUSEDREG_DEVICE float* cell_constants() const { return params.room.cell_constants.in(shared); }
  FUSEDREG_DEVICE float* gate_moments() const { return params.room.gate_moments.in(shared); }
  FUSEDREG_DEVICE float* cell_moments() const { return params.room.cell_moments.in(shared); }
  FUSEDREG_DEVICE float* sums() const { return params.room.sums.in(shared); }
  FUSEDREG_DEVICE int length(int row) const { return params.room.lengths.in(shared)[row]; }

  // This thread's cells among rows first ... last - 1 of the tile, one after another. What is computed from a cell's
  // place is not to be kept from one step to the next, and the loop not to be unrolled: the registers are for W_hh.
  template <class Action>
  FUSEDREG_DEVICE void each_cell(int first, int last, const Action& action) const {
    const int thread = opaque(thread_index()), own = thread % U;
    if (own >= units) return;
    int row = first - first % kRowStep + thread / U;
    if (row < first) row += kRowStep;
#pragma unroll 1
    for (; row < last; row += kRowStep) action(ForwardCell<U>{row, own});
  }

  // Lengths, biases, gains and shifts. A barrier must follow.
  template <class Storage>
  FUSEDREG_DEVICE void set_up_constants(Storage) const {
    const LayerInputs& in = params.loop.layer.in;
    for (int row = thread_index(); row < rows; row += kProductThreads) {
      params.room.lengths.in(shared)[row] = static_cast<int>(row_length(in, first_row + row));
    }
    for (int column = thread_index(); column < 4 * U; column += kProductThreads) {
      const int64_t unit = first_unit + column % U, at = column / U * static_cast<int64_t>(in.hidden_size) + unit;
      const bool exists = unit < in.hidden_size;
      gate_constants()[column] = exists ? static_cast<const float*>(params.loop.layer.bias)[at] : 0.0f;
      gate_constants()[4 * U + column] = exists ? norm_parameter<Storage>(in.norm.recurrent_weight, at, 1.0f) : 0.0f;
    }
    for (int own = thread_index(); own < units; own += kProductThreads) {
      cell_constants()[own] = norm_parameter<Storage>(in.norm.cell_weight, first_unit + own, 1.0f);
      cell_constants()[U + own] = norm_parameter<Storage>(in.norm.cell_bias, first_unit + own, 0.0f);
    }
  }

  FUSEDREG_DEVICE void find_longest() {
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      if (length(row) > longest) longest = length(row);
    }
  }

  FUSEDREG_DEVICE void count_rows(int s) {
    if (params.shape.norm != NormKind::Batch) return;
    int own = 0;
    for (int row = opaque(lane()); row < rows; row += 32) own += s < length(row) ? 1 : 0;
    for (int mask = 1; mask < 32; mask *= 2) own += shuffle_xor(own, mask);
    count = own;
  }
};

}  // namespace fusedreg::cuda
