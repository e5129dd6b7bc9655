// The whole forward loop in one kernel: a block owns all four gates of some units, for every row of its tile, and keeps
// its part of W_hh on the chip. What blocks exchange each step is h.
//
// A step of a block, and what hides behind what:
//
//   publish h_{s-1}            its slice, to all blocks of the group
//     write y, c, gates of s-1   while the others' slices are on their way: results and masks wait
//     draw masks, fetch terms    in shared memory for the moment they are needed
//   wait for h_{s-1}           each warp for the blocks whose units are its part of K
//   multiply                   the warps' partial sums
//   cells                      sums -> gates -> c, h; with norms in up to three passes over the cells
//
// A cell (row, unit) belongs to one thread throughout, so that what a cell keeps in shared memory needs no barrier.
#pragma once

#include "cell_step.cuh"
#include "exchange.cuh"
#include "packed_masks.cuh"
#include "persistent_forward_norms.cuh"
#include "persistent_forward_shape.h"
#include "resident_product.cuh"

namespace fusedreg::cuda {

// A block's part of W_hh, (4H, H): row n of the product is gate n / U of unit n % U.
template <class Storage, int U>
struct ForwardWeights {
  const Storage* weight;
  int hidden_size, first_unit;

  FUSEDREG_DEVICE Storage operator()(int n, int k) const {
    const int unit = first_unit + n % U;
    if (unit >= hidden_size || k >= hidden_size) return Storage{};
    return weight[(static_cast<int64_t>(n / U) * hidden_size + unit) * hidden_size + k];
  }
};

template <class Mode, int U, bool kClustered>
class PersistentForward {
  using Storage = typename Mode::Storage;
  static constexpr int kColumns = 4 * U;
  static constexpr int kRegisterChunks = forward_register_chunks(U, Mode::kMatrixInstructions);
  static constexpr int kChunksAhead = forward_chunks_ahead(U, Mode::kMatrixInstructions);
  using Product = ResidentProduct<Mode, kColumns / 8, kRegisterChunks, kChunksAhead>;
  using Source = std::conditional_t<kClustered, SharedSource, GlobalSource>;
  using Block = ForwardBlock<U>;
  using Cell = ForwardCell<U>;

 public:
  FUSEDREG_DEVICE explicit PersistentForward(const PersistentForwardParams& params)
      : block_(params), exchange_(params.exchange, kClustered, exchange_memory(params)) {}

  FUSEDREG_DEVICE void run() {
    const PersistentForwardParams& params = block_.params;
    const ForwardShape& shape = params.shape;
    const ForwardRoom& room = params.room;
    const int chunks = params.chunks, most_chunks = params.most_chunks;
    const int first_chunk = warp_index() * most_chunks;
    const int own_chunks = first_chunk >= chunks ? 0 : smaller(most_chunks, chunks - first_chunk);
    Product product(room.product.in(block_.shared), most_chunks, first_chunk, own_chunks);
    product.load(ForwardWeights<Storage, U>{static_cast<const Storage*>(params.loop.layer.weight_hh), shape.hidden_size,
                                            block_.first_unit});
    // The blocks whose units this warp multiplies with: between them, the warps wait for every block.
    const int first_block = first_chunk * shape.chunk_values() / U;
    const int past_block = ((first_chunk + own_chunks) * shape.chunk_values() + U - 1) / U;
    const int last_block = own_chunks == 0 ? first_block : smaller(past_block, shape.blocks);

    set_up();
    exchange_.begin();
    for (int s = 0; s < block_.longest; ++s) {
      exchange_.publish(room.staged.in(block_.shared));
      if (s > 0) write_results(s - 1);
      prepare(s);
      exchange_.wait(first_block, last_block);
      for (int first = 0; first < block_.rows; first += shape.rows_per_pass) {
        if (first > 0) sync_block();  // the last pass's sums have been read
        const int last = smaller(first + shape.rows_per_pass, block_.rows);
        product.multiply(source(), first, (last - first + kTileRows - 1) / kTileRows, partials(), shape.rows_per_pass);
        sync_block();
        take_sums(first, last);
      }
      if (shape.norm != NormKind::None) run_norms(s);
    }
    if (block_.longest > 0) write_results(block_.longest - 1);
    write_padding();
    write_final_states();
  }

 private:
  FUSEDREG_DEVICE static int smaller(int a, int b) { return a < b ? a : b; }

  FUSEDREG_DEVICE static void* exchange_memory(const PersistentForwardParams& params) {
    return kClustered ? params.room.exchange.in(dynamic_shared()) : params.loop.scratch;
  }
  FUSEDREG_DEVICE Source source() const {
    const ForwardShape& shape = block_.params.shape;
    return {exchange_.buffer(), shape.rows, block_.params.exchange.line_bytes, shape.copies};
  }
  FUSEDREG_DEVICE float* partials() const { return block_.params.room.partials.in(block_.shared); }

  // ---- before the first step ----

  FUSEDREG_DEVICE void set_up() {
    const PersistentForwardParams& params = block_.params;
    const LayerInputs& in = params.loop.layer.in;
    block_.set_up_constants(Storage{});
    const int slices = params.shape.copies * params.shape.rows * U;
    Storage* const staged = reinterpret_cast<Storage*>(params.room.staged.in(block_.shared));
    for (int i = thread_index(); i < slices; i += kProductThreads) staged[i] = Storage{};  // also beyond the last unit
    sync_block();
    block_.find_longest();
    block_.each_cell(0, block_.rows, [&](const Cell& cell) {
      const int64_t b = block_.batch_row(cell), unit = block_.unit(cell);
      const int64_t at = b * params.shape.hidden_size + unit;
      const Storage* hidden = static_cast<const Storage*>(in.initial_hidden);
      const float* initial_cell = static_cast<const float*>(in.initial_cell);
      const float h = hidden == nullptr ? 0.0f : widen(hidden[at]);
      block_.hidden()[cell.index()] = h;
      block_.cell()[cell.index()] = initial_cell == nullptr ? 0.0f : initial_cell[at];
      uint32_t bits = packed_sequence_masks(params.masks, block_.row_key(b), unit);
      if (begins_from_zero(in, b, block_.length(cell.row), 0)) bits |= kNextBeginsFromZero;
      block_.masks()[cell.index()] = static_cast<uint16_t>(bits);
      stage(cell, h, bits);
    });
  }

  // ---- between publishing and waiting ----

  // What step s needs that no other block makes: masks, input terms, what each row does. The terms come from device
  // memory, into the place that write_results() has just read; take_sums() waits for them.
  FUSEDREG_DEVICE void prepare(int s) {
    const PersistentForwardParams& params = block_.params;
    const LoopInputs& layer = params.loop.layer;
    block_.count_rows(s);
    if (params.shape.norm == NormKind::Batch) load_population(block_, s);
    block_.each_cell(0, block_.rows, [&](const Cell& cell) {
      const uint32_t before = block_.masks()[cell.index()];
      uint32_t bits = before & kSequenceBits;
      const int64_t length = block_.length(cell.row);
      if (s < length) {
        const int64_t b = block_.batch_row(cell), unit = block_.unit(cell);
        const int64_t t = position(layer.in, length, s), hidden_size = layer.in.hidden_size;
        const uint32_t* terms =
            static_cast<const uint32_t*>(layer.input_terms) + (t * layer.in.rows + b) * 4 * hidden_size + unit;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate, terms += hidden_size) {
          fetch_to_shared(reinterpret_cast<uint32_t*>(block_.gates() + cell.gate(gate)), terms);
        }
        bits |= kRuns | packed_step_masks(params.masks, block_.row_key(b), unit, t);
        if ((before & kNextBeginsFromZero) != 0) bits |= kBeginsFromZero;
        if (begins_from_zero(layer.in, b, length, s + 1)) bits |= kNextBeginsFromZero;
      }
      block_.masks()[cell.index()] = static_cast<uint16_t>(bits);
    });
  }

  FUSEDREG_DEVICE void write_results(int s) {
    const PersistentForwardParams& params = block_.params;
    const LayerInputs& in = params.loop.layer.in;
    const LayerOutputs& out = params.loop.out;
    const Storage* const outputs = reinterpret_cast<const Storage*>(params.room.outputs.in(block_.shared));
    block_.each_cell(0, block_.rows, [&](const Cell& cell) {
      const int64_t length = block_.length(cell.row);
      if (s >= length) return write_zeros(cell, s);
      const int64_t at = position(in, length, s) * in.rows + block_.batch_row(cell);
      const CellExit<float> exit{block_.hidden()[cell.index()], block_.cell()[cell.index()],
                                 widen(outputs[cell.index()])};
      write_states<Storage>(out, at * in.hidden_size + block_.unit(cell), exit);
      if (out.gates == nullptr) return;
      const float* const values = params.shape.norm == NormKind::None ? block_.gates() : block_.raw();
      float gates[4];
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) gates[gate] = values[cell.gate(gate)];
      write_saved_gates(cell, at, gates);
    });
    if (params.shape.norm == NormKind::Batch) write_batch_moments(block_, s, true);
    if (params.shape.norm == NormKind::Layer) write_layer_moments(block_, s, true);
  }

  FUSEDREG_DEVICE void write_saved_gates(const Cell& cell, int64_t at, const float (&gates)[4]) const {
    const PersistentForwardParams& params = block_.params;
    void* const saved = params.loop.out.gates;
    const int hidden_size = params.shape.hidden_size;
    if (params.shape.norm == NormKind::None) {
      write_activated_gates<Storage>(saved, at, hidden_size, block_.unit(cell),
                                     Gates<float>{gates[0], gates[1], gates[2], gates[3]});
    } else {
      write_gates(static_cast<float*>(saved), at, hidden_size, block_.unit(cell), gates);
    }
  }

  // A row in padding: results hold zeros there. As fixed point, an activated gate of 0 is not the bits 0 (storage.h).
  FUSEDREG_DEVICE void write_zeros(const Cell& cell, int64_t t) const {
    const PersistentForwardParams& params = block_.params;
    const int64_t at = t * params.loop.layer.in.rows + block_.batch_row(cell);
    write_states<Storage>(params.loop.out, at * params.shape.hidden_size + block_.unit(cell), CellExit<float>{});
    if (params.loop.out.gates == nullptr) return;
    if (params.shape.norm == NormKind::None) {
      const Kept<Storage> zeros[4] = {};
      write_kept(cell, at, zeros);
    } else {
      const float zeros[4] = {};
      write_gates(static_cast<float*>(params.loop.out.gates), at, params.shape.hidden_size, block_.unit(cell), zeros);
    }
  }
  FUSEDREG_DEVICE void write_kept(const Cell& cell, int64_t at, const Kept<Storage> (&values)[4]) const {
    const int64_t hidden_size = block_.params.shape.hidden_size;
    Kept<Storage>* const to =
        static_cast<Kept<Storage>*>(block_.params.loop.out.gates) + at * 4 * hidden_size + block_.unit(cell);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) to[gate * hidden_size] = values[gate];
  }

  // ---- the cells ----

  // The sums of rows first ... last - 1: through the cells at once, or where there is a norm only into `raw`.
  FUSEDREG_DEVICE void take_sums(int first, int last) {
    const ForwardShape& shape = block_.params.shape;
    const int warps = block_.params.working_warps;
    wait_for_fetched();  // this thread's own: the cells that it goes through are those that it fetched for
    block_.each_cell(first, last, [&](const Cell& cell) {
      const uint32_t bits = block_.masks()[cell.index()];
      if ((bits & kRuns) == 0) return;
      float z[4];
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        z[gate] = block_.params.masks.recurrent_scale *
                  Product::sum(partials(), shape.rows_per_pass, cell.row - first, gate * U + cell.unit, warps);
        if (shape.norm != NormKind::None) {
          block_.raw()[cell.gate(gate)] = z[gate];
        } else {
          z[gate] += input_term(cell, gate);
        }
      }
      if (shape.norm != NormKind::None) return;
      const float candidate = enter(cell, bits, z);
      leave(cell, bits, candidate, candidate);
    });
  }

  // N_r(r) + b of a gate; once the cell is entered, the activated gate stands in its place.
  FUSEDREG_DEVICE float input_term(const Cell& cell, int gate) const {
    return block_.gates()[cell.gate(gate)] + block_.gate_constants()[gate * U + cell.unit];
  }

  // N_a, the cells, and N_c between their halves.
  FUSEDREG_DEVICE void run_norms(int s) {
    const ForwardShape& shape = block_.params.shape;
    if (shape.norm_recurrent) take_gate_moments(block_, exchange_, s);
    block_.each_cell(0, block_.rows, [&](const Cell& cell) {
      const uint32_t bits = block_.masks()[cell.index()];
      if ((bits & kRuns) == 0) return;
      float z[4];
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        const float a = block_.raw()[cell.gate(gate)];
        z[gate] = (shape.norm_recurrent ? normalised_gate(block_, cell, gate, a) : a) + input_term(cell, gate);
      }
      const float candidate = enter(cell, bits, z);
      if (shape.norm_cell) {
        block_.candidates()[cell.index()] = candidate;
      } else {
        leave(cell, bits, candidate, candidate);
      }
    });
    if (!shape.norm_cell) return;
    take_cell_moments(block_, exchange_, s);
    block_.each_cell(0, block_.rows, [&](const Cell& cell) {
      const uint32_t bits = block_.masks()[cell.index()];
      if ((bits & kRuns) == 0) return;
      const float candidate = block_.candidates()[cell.index()];
      leave(cell, bits, candidate, normalised_cell(block_, cell, candidate));
    });
  }

  // The first half of a cell; leaves the gates where the second half and the results find them.
  FUSEDREG_DEVICE float enter(const Cell& cell, uint32_t bits, const float (&z)[4]) {
    const float previous = (bits & kBeginsFromZero) != 0 ? 0.0f : block_.cell()[cell.index()];
    const CellEntry<float> entry = begin_cell(z, previous, unpacked_step_masks(block_.params.masks, bits));
    block_.gates()[cell.gate(0)] = entry.gates.i;
    block_.gates()[cell.gate(1)] = entry.gates.f;
    block_.gates()[cell.gate(2)] = entry.gates.g;
    block_.gates()[cell.gate(3)] = entry.gates.o;
    return entry.candidate;
  }

  // The second half, to what is carried, returned and published.
  FUSEDREG_DEVICE void leave(const Cell& cell, uint32_t bits, float candidate, float normalised) {
    const PersistentForwardParams& params = block_.params;
    const bool from_zero = (bits & kBeginsFromZero) != 0;
    const CellExit<float> exit =
        finish_cell<Storage>(params.loop.layer.in.options, unpacked_step_masks(params.masks, bits),
                             block_.gates()[cell.gate(3)], from_zero ? 0.0f : block_.cell()[cell.index()],
                             from_zero ? 0.0f : block_.hidden()[cell.index()], candidate, normalised);
    block_.cell()[cell.index()] = exit.cell;
    block_.hidden()[cell.index()] = exit.hidden;
    reinterpret_cast<Storage*>(params.room.outputs.in(block_.shared))[cell.index()] = narrow<Storage>(exit.output);
    stage(cell, exit.hidden, bits);
  }

  // h as the next step's product reads it. A row that is past its length is read by nobody.
  FUSEDREG_DEVICE void stage(const Cell& cell, float hidden, uint32_t bits) {
    const PersistentForwardParams& params = block_.params;
    Storage* const staged = reinterpret_cast<Storage*>(params.room.staged.in(block_.shared));
    for (int copy = 0; copy < params.shape.copies; ++copy) {
      const Storage value = published_hidden<Storage>(hidden, unpacked_hidden_mask(params.masks, bits, copy),
                                                      (bits & kNextBeginsFromZero) != 0);
      staged[(copy * params.shape.rows + cell.row) * U + cell.unit] = exchanged<Mode>(widen(value));
    }
  }

  // ---- after the last step ----

  // Steps that no row of the tile reaches.
  FUSEDREG_DEVICE void write_padding() {
    const PersistentForwardParams& params = block_.params;
    for (int s = block_.longest; s < params.loop.layer.in.steps; ++s) {
      block_.each_cell(0, block_.rows, [&](const Cell& cell) { write_zeros(cell, s); });
      if (params.shape.norm == NormKind::Batch) write_batch_moments(block_, s, false);
      if (params.shape.norm == NormKind::Layer) write_layer_moments(block_, s, false);
    }
  }

  FUSEDREG_DEVICE void write_final_states() {
    const LayerOutputs& out = block_.params.loop.out;
    block_.each_cell(0, block_.rows, [&](const Cell& cell) {
      const int64_t at = block_.batch_row(cell) * block_.params.shape.hidden_size + block_.unit(cell);
      static_cast<Storage*>(out.final_hidden)[at] = narrow<Storage>(block_.hidden()[cell.index()]);
      static_cast<float*>(out.final_cell)[at] = block_.cell()[cell.index()];
    });
  }

  Block block_;
  Exchange exchange_;
};

template <class Mode, int U, bool kClustered>
FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(kProductThreads, 1) void persistent_forward_kernel(
    FUSEDREG_PARAMETER PersistentForwardParams params) {
  PersistentForward<Mode, U, kClustered>(params).run();
}

}  // namespace fusedreg::cuda
