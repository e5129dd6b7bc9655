// What a block of the persistent backward knows of its cells: which they are, what it keeps of each in shared memory,
// and what of a step it can get ready before the step's gradients arrive.
#pragma once

#include "backward_sums.cuh"
#include "cell_step.cuh"
#include "moments.cuh"
#include "packed_masks.cuh"

namespace fusedreg::cuda {

// One norm at one place.
struct BackwardNorm {
  float mean, scale, spread;
  FUSEDREG_DEVICE float normalised(float value) const { return (value - mean) * spread; }
};

template <class Storage, int kUnits>
class BackwardBlock {
 public:
  const BackwardLoop& loop;
  const LayerInputs& in;

  FUSEDREG_DEVICE BackwardBlock(const PersistentBackwardParams& params, int own_block)
      : loop(params.loop),
        in(params.loop.layer.in),
        params_(params),
        shape_(params.shape),
        masks_(params.masks),
        key_(mask_key(params.loop.layer.seed, params.masks.layer_direction)),
        first_row_(block_index() / params.shape.blocks * params.shape.rows),
        first_unit_(own_block * kUnits) {}

  FUSEDREG_DEVICE int first_unit() const { return first_unit_; }

  // Before anything else.
  FUSEDREG_DEVICE void set_up() {
    for (int row = thread_index(); row < shape_.rows; row += block_threads()) {
      lengths()[row] = first_row_ + row < in.rows ? static_cast<int>(row_length(in, first_row_ + row)) : 0;
    }
    set_up_constants();
    sync_block();
    Storage* const staged = params_.shared<Storage>(params_.room.staged);
    const Storage* const grad_hidden = static_cast<const Storage*>(loop.grad_final_hidden);
    const float* const grad_cell = static_cast<const float*>(loop.grad_final_cell);
    for_each_cell(0, shape_.rows, 0, [&](const Cell& cell) {
      if (cell.row >= shape_.rows) return;
      // Zeros where there is no cell; where there is one, until its row's last step.
      for (int gate = 0; gate < 4; ++gate) staged[staged_index(cell, gate)] = Storage{};
      const int64_t at = int64_t{cell.b} * in.hidden_size + cell.unit;
      hidden_of(cell) = cell.exists && grad_hidden != nullptr ? widen(grad_hidden[at]) : 0.0f;
      cell_of(cell) = cell.exists && grad_cell != nullptr ? grad_cell[at] : 0.0f;
      bits_of(cell) =
          static_cast<uint16_t>(cell.exists ? packed_sequence_masks(masks_, row_key(key_, cell), cell.unit) : 0u);
    });
  }

  // The steps that some row of the tile takes part in.
  FUSEDREG_DEVICE int longest() const {
    int longest = 0;
    for (int row = 0; row < shape_.rows; ++row) longest = lengths()[row] > longest ? lengths()[row] : longest;
    return longest;
  }

  // What step s needs and no other block has a say in: masks, and what it reads of device memory, which is there after
  // wait_for_fetched() and a barrier. s = -1: nothing but the shift of what the step after needs on.
  FUSEDREG_DEVICE void prepare(int s) {
    // Opaque: the ten rounds' keys are to be computed here, not kept from step to step.
    const MaskKey key{static_cast<uint32_t>(opaque(static_cast<int>(key_.low))),
                      static_cast<uint32_t>(opaque(static_cast<int>(key_.high))), key_.layer_direction};
    for_each_cell(0, shape_.rows, s, [&](const Cell& cell) {
      if (!cell.exists) return;
      const uint32_t before = bits_of(cell);
      uint32_t bits = before & kSequenceBits;
      if ((before & kBeginsFromZero) != 0) bits |= kNextBeginsFromZero;
      if (cell.runs && s >= 0) {
        if (begins_from_zero(in, cell.b, cell.length, s)) bits |= kBeginsFromZero;
        fetch(cell, s, (bits & kBeginsFromZero) != 0);
        bits |= packed_step_masks(masks_, row_key(key, cell), cell.unit, position(in, cell.length, s));
      }
      bits_of(cell) = static_cast<uint16_t>(bits);
    });
    if (s >= 0) prepare_moments(s);
  }

 protected:
  // One (row, unit) of the block at step s.
  struct Cell {
    int index;  // in [row][unit]
    int row;    // of the tile
    int column;
    int b, unit;
    int length;
    bool exists;  // in the batch and in the layer
    bool runs;    // and the row takes part in the step
    int64_t at;   // t * B + b
  };

  // Cells of rows first ... last - 1, thread by thread; `first` is a multiple of kTileRows. Whole warps come along,
  // beyond the last row too.
  template <class Visit>
  FUSEDREG_DEVICE void for_each_cell(int first, int last, int s, const Visit& visit) const {
    const int begin = first * kUnits, end = (last * kUnits + 31) / 32 * 32;
    // Opaque: nothing of a cell is to be kept from step to step in registers that the product could use.
    const int own = opaque(thread_index());
#pragma unroll 1
    for (int i = begin + ((own - begin) & (kProductThreads - 1)); i < end; i += kProductThreads) {
      Cell cell;
      cell.index = i;
      cell.row = i / kUnits;
      cell.column = i % kUnits;
      cell.b = first_row_ + cell.row;
      cell.unit = first_unit_ + cell.column;
      cell.exists = cell.row < last && cell.b < in.rows && cell.unit < in.hidden_size;
      cell.length = cell.exists ? lengths()[cell.row] : 0;
      cell.runs = s < cell.length;
      cell.at = position(in, cell.length, s) * in.rows + cell.b;
      visit(cell);
    }
  }

  // ---- what stands in shared memory ----

  FUSEDREG_DEVICE int* lengths() const { return params_.shared<int>(params_.room.lengths); }
  FUSEDREG_DEVICE float* gate_constants() const { return params_.shared<float>(params_.room.gate_constants); }
  FUSEDREG_DEVICE float* cell_constants() const { return params_.shared<float>(params_.room.cell_constants); }
  FUSEDREG_DEVICE float gain(const Cell& cell, int gate) const {
    return gate_constants()[(4 + gate) * kUnits + cell.column];
  }
  FUSEDREG_DEVICE MaskKey row_key(const MaskKey& key, const Cell& cell) const {
    return key_of_row(loop.layer.seed, key, cell.b);
  }
  FUSEDREG_DEVICE float& hidden_of(const Cell& cell) const {
    return params_.shared<float>(params_.room.hidden)[cell.index];
  }
  FUSEDREG_DEVICE float& cell_of(const Cell& cell) const {
    return params_.shared<float>(params_.room.cell)[cell.index];
  }
  FUSEDREG_DEVICE uint16_t& bits_of(const Cell& cell) const {
    return params_.shared<uint16_t>(params_.room.masks)[cell.index];
  }
  FUSEDREG_DEVICE int staged_index(const Cell& cell, int gate) const {
    return (cell.row * 4 + gate) * kUnits + cell.column;
  }
  // Value number `value` of a cell in an array [value][row][unit].
  template <class Value>
  FUSEDREG_DEVICE Value& of_cell(int place, const Cell& cell, int value = 0) const {
    return params_.shared<Value>(place)[value * shape_.rows * kUnits + cell.index];
  }
  FUSEDREG_DEVICE float& traced(const Cell& cell, int value) const {
    return of_cell<float>(params_.room.trace, cell, value);
  }

  // A norm's moments at the prepared step: batch norm's are a column's, layer norm's a row's.
  FUSEDREG_DEVICE BackwardNorm gate_norm(const Cell& cell, int gate) const {
    const bool batch = shape_.norm == NormKind::Batch;
    return norm_at(params_.room.gate_moments, batch ? 4 * kUnits : shape_.rows,
                   batch ? gate * kUnits + cell.column : cell.row);
  }
  FUSEDREG_DEVICE BackwardNorm cell_norm(const Cell& cell) const {
    const bool batch = shape_.norm == NormKind::Batch;
    return norm_at(params_.room.cell_moments, batch ? kUnits : shape_.rows, batch ? cell.column : cell.row);
  }

  const PersistentBackwardParams& params_;
  const BackwardShape& shape_;
  const LoopMasks<float>& masks_;
  // Batch norm, at the prepared step: the rows that its statistics were taken from; 0 where they are constants.
  int count_ = 0;

 private:
  FUSEDREG_DEVICE void set_up_constants() {
    const int64_t H = in.hidden_size;
    const NormParameters& norm = in.norm;
    for (int i = thread_index(); i < 4 * kUnits; i += block_threads()) {
      const int unit = first_unit_ + i % kUnits;
      const int64_t column = i / kUnits * H + unit;
      const bool exists = unit < H;
      gate_constants()[i] = exists ? static_cast<const float*>(loop.layer.bias)[column] : 0.0f;
      gate_constants()[4 * kUnits + i] = exists ? norm_parameter<Storage>(norm.recurrent_weight, column, 1.0f) : 0.0f;
      if (shape_.norm_cell && i < kUnits) {
        cell_constants()[i] = exists ? norm_parameter<Storage>(norm.cell_weight, unit, 1.0f) : 0.0f;
        cell_constants()[kUnits + i] = exists ? norm_parameter<Storage>(norm.cell_bias, unit, 0.0f) : 0.0f;
      }
    }
  }

  // ---- what a step reads of device memory ----

  FUSEDREG_DEVICE void fetch(const Cell& cell, int s, bool from_zero) const {
    const int64_t H = in.hidden_size, at = cell.at * H + cell.unit, gates_at = cell.at * 4 * H + cell.unit;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      if (shape_.activated) {
        const Kept<Storage>* const from = static_cast<const Kept<Storage>*>(loop.gates) + gates_at + gate * H;
        fetch_value(of_cell<Kept<Storage>>(params_.room.gates, cell, gate), from, cell);
      } else {
        const int64_t from = gates_at + gate * H;
        fetch_value(of_cell<float>(params_.room.gates, cell, gate), static_cast<const float*>(loop.gates) + from, cell);
        fetch_value(traced(cell, gate), static_cast<const float*>(loop.layer.input_terms) + from, cell);
      }
    }
    if (loop.grad_output != nullptr) {
      const int64_t t = cell.at / in.rows;
      const Storage* const from = static_cast<const Storage*>(loop.grad_output) + t * loop.grad_output_step_stride +
                                  cell.b * loop.grad_output_row_stride + cell.unit;
      fetch_value(of_cell<Storage>(params_.room.grad_output, cell), from, cell);
    }
    if (loop.grad_cells != nullptr) {
      fetch_value(of_cell<float>(params_.room.grad_cells, cell), static_cast<const float*>(loop.grad_cells) + at, cell);
    }
    float& previous = of_cell<float>(params_.room.previous_cell, cell);
    if (from_zero || (s == 0 && in.initial_cell == nullptr)) {
      previous = 0;
    } else if (s == 0) {
      fetch_value(previous, static_cast<const float*>(in.initial_cell) + int64_t{cell.b} * H + cell.unit, cell);
    } else {
      const int64_t from = (position(in, cell.length, s - 1) * in.rows + cell.b) * H + cell.unit;
      fetch_value(previous, static_cast<const float*>(loop.saved.cells) + from, cell);
    }
  }

  // Four bytes are fetched at a time: of 16-bit values two units of a row, by the thread of the first, where they lie
  // so that this is possible. Else they are read as they are needed.
  template <class Value>
  FUSEDREG_DEVICE void fetch_value(Value& to, const Value* from, const Cell& cell) const {
    if constexpr (sizeof(Value) == 4) {
      fetch_to_shared(reinterpret_cast<uint32_t*>(&to), reinterpret_cast<const uint32_t*>(from));
    } else {
      const int second = cell.column % 2;
      const bool aligned = reinterpret_cast<uintptr_t>(from - second) % 4 == 0;
      if (!aligned || cell.unit - second + 1 >= in.hidden_size) {
        to = *from;
      } else if (second == 0) {
        fetch_to_shared(reinterpret_cast<uint32_t*>(&to), reinterpret_cast<const uint32_t*>(from));
      }
    }
  }

  // ---- a norm's moments ----

  FUSEDREG_DEVICE BackwardNorm norm_at(int room, int places, int place) const {
    const float* const moments = params_.shared<float>(room);
    return {moments[place], moments[places + place], moments[2 * places + place]};
  }
  FUSEDREG_DEVICE void keep_norm(int room, int places, int place, const Moments<float>& moments) const {
    float* const to = params_.shared<float>(room);
    to[place] = moments.mean;
    to[places + place] = moments.scale(in.norm_eps);
    to[2 * places + place] = moments.spread_scale(in.norm_eps);
  }

  FUSEDREG_DEVICE void prepare_moments(int s) {
    const LayerOutputs& saved = loop.saved;
    const BackwardRoom& room = params_.room;
    const int64_t H = in.hidden_size;
    if (shape_.norm == NormKind::Batch) {
      int count = 0;
      for (int row = 0; row < shape_.rows; ++row) count += s < lengths()[row] ? 1 : 0;
      const bool constant = !takes_batch_statistics(in.options, count);
      count_ = constant ? 0 : count;
      for (int i = opaque(thread_index()); i < 4 * kUnits; i += block_threads()) {
        const int unit = first_unit_ + i % kUnits;
        if (unit >= H) continue;
        if (shape_.norm_recurrent) {
          const int64_t column = i / kUnits * H + unit;
          keep_norm(room.gate_moments, 4 * kUnits, i,
                    load_moments<float>(saved.recurrent_statistics, s, 4 * H, column, constant));
        }
        if (shape_.norm_cell && i < kUnits) {
          keep_norm(room.cell_moments, kUnits, i, load_moments<float>(saved.cell_statistics, s, H, unit, constant));
        }
      }
    } else if (shape_.norm == NormKind::Layer) {
      for (int row = opaque(thread_index()); row < shape_.rows; row += block_threads()) {
        const int64_t length = lengths()[row], t = position(in, length, s), b = first_row_ + row;
        if (s >= length) continue;
        if (shape_.norm_recurrent) {
          keep_norm(room.gate_moments, shape_.rows, row,
                    load_moments<float>(saved.recurrent_statistics, t, in.rows, b, false));
        }
        if (shape_.norm_cell) {
          keep_norm(room.cell_moments, shape_.rows, row,
                    load_moments<float>(saved.cell_statistics, t, in.rows, b, false));
        }
      }
    }
  }

  MaskKey key_;
  int first_row_, first_unit_;
};

}  // namespace fusedreg::cuda
