// How the persistent forward is cut up, and what a block keeps in shared memory: plain C++, since the choice of a tier
// needs the sizes and the kernel the places.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/params.h"
#include "exchange_layout.h"
#include "product_sizes.h"

namespace fusedreg::cuda {

// Chunks of W that a warp keeps in registers: 64 registers a thread at 8 units, 128 at 16 and 32.
FUSEDREG_HOST_DEVICE constexpr int forward_register_chunks(int units) { return units == 32 ? 2 : 4; }

struct ForwardShape {
  bool clustered = false;
  int rows = 0;           // of a batch tile
  int rows_per_pass = 0;  // of the product, a multiple of kTileRows
  int units = 0;          // of a block: 8, 16 or 32
  int blocks = 0;         // that share out the units
  int hidden_size = 0;
  int storage_bytes = 0;  // 2 or 4
  bool matrix_instructions = false;
  int copies = 1;  // of h in the exchange: 4 where each gate has a hidden mask of its own
  NormKind norm = NormKind::None;
  bool norm_recurrent = false;
  bool norm_cell = false;

  FUSEDREG_HOST_DEVICE constexpr int columns() const { return 4 * units; }
  FUSEDREG_HOST_DEVICE constexpr int chunk_values() const { return kChunkBytes / storage_bytes; }
  FUSEDREG_HOST_DEVICE constexpr int chunks() const { return (hidden_size + chunk_values() - 1) / chunk_values(); }
  FUSEDREG_HOST_DEVICE constexpr int most_chunks() const { return (chunks() + kProductWarps - 1) / kProductWarps; }
  // Warps that have a part of K: the first ones, contiguous parts, so that each waits for few blocks.
  FUSEDREG_HOST_DEVICE constexpr int working_warps() const { return (chunks() + most_chunks() - 1) / most_chunks(); }
  // Between two rows of a block's gates in shared memory: rows next to each other share no bank.
  FUSEDREG_HOST_DEVICE constexpr int gate_stride() const { return 5 * units; }

  FUSEDREG_HOST_DEVICE constexpr ExchangeLayout exchange() const {
    const int needed = blocks * units * storage_bytes;
    const int padded = (needed + kChunkBytes - 1) / kChunkBytes * kChunkBytes;
    ExchangeLayout layout{};
    layout.blocks = blocks;
    layout.lines = copies * rows;
    // In shared memory rows stand an odd multiple of 64 bytes apart: the product's reads are free of bank conflicts.
    layout.line_bytes = clustered && padded % (2 * kChunkBytes) == 0 ? padded + kChunkBytes : padded;
    layout.slice_bytes = units * storage_bytes;
    layout.rows = norm == NormKind::Layer && (norm_recurrent || norm_cell) ? rows : 0;
    layout.part_bytes = padded;
    return layout;
  }
};

// The places of everything, one after another from `base` on; `bytes` of them. All 16-byte aligned.
struct ForwardRoom {
  char* exchange = nullptr;         // cluster: the exchange's buffers
  char* product = nullptr;          // W's fragments
  float* partials = nullptr;        // of the product
  char* staged = nullptr;           // [copy][row][unit] h as published
  float* hidden = nullptr;          // [row][unit] h, carried
  float* cell = nullptr;            // [row][unit] c, carried
  char* outputs = nullptr;          // [row][unit] y of the step, storage
  float* gates = nullptr;           // [row][gate][unit] input terms, then the activated gates
  uint16_t* masks = nullptr;        // [row][unit] what is dropped, and what the row does at this step
  int* lengths = nullptr;           // [row]
  float* gate_constants = nullptr;  // [bias, N_a's gain][gate][unit]
  float* cell_constants = nullptr;  // [N_c's gain, shift][unit]
  float* raw = nullptr;             // [row][gate][unit] a, where there is a norm
  float* candidates = nullptr;      // [row][unit] where N_c needs all of them before any goes on
  float* gate_moments = nullptr;    // batch norm: [mean, variance, scale][column]; layer norm: [row][mean, variance]
  float* cell_moments = nullptr;
  float* sums = nullptr;  // batch norm: a number a thread, twice; layer norm: the block's two numbers of each row
  size_t bytes = 0;

  FUSEDREG_HOST_DEVICE ForwardRoom(const ForwardShape& shape, char* base) : base_(base) {
    const size_t rows = static_cast<size_t>(shape.rows), units = static_cast<size_t>(shape.units);
    const size_t storage = static_cast<size_t>(shape.storage_bytes), copies = static_cast<size_t>(shape.copies);
    const size_t gate_values = rows * static_cast<size_t>(shape.gate_stride());
    const bool batch = shape.norm == NormKind::Batch;
    if (shape.clustered) exchange = take<char>(cluster_exchange_bytes(shape.exchange()));
    product = take<char>(
        ProductSizes::fragment_bytes(shape.columns(), forward_register_chunks(shape.units), shape.most_chunks()) +
        ProductSizes::staging_bytes(shape.matrix_instructions, shape.copies));
    partials = take<float>(ProductSizes::partial_bytes(shape.columns(), shape.rows_per_pass) / sizeof(float));
    staged = take<char>(copies * rows * units * storage);
    hidden = take<float>(rows * units);
    cell = take<float>(rows * units);
    outputs = take<char>(rows * units * storage);
    gates = take<float>(gate_values);
    masks = take<uint16_t>(rows * units);
    lengths = take<int>(rows);
    gate_constants = take<float>(8 * units);
    cell_constants = take<float>(2 * units);
    if (shape.norm == NormKind::None) return;
    raw = take<float>(gate_values);
    if (shape.norm_cell) candidates = take<float>(rows * units);
    gate_moments = take<float>(batch ? 12 * units : 2 * rows);
    cell_moments = take<float>(batch ? 3 * units : 2 * rows);
    sums = take<float>(batch ? 2 * kProductThreads : 2 * rows);
  }

 private:
  template <class Value>
  FUSEDREG_HOST_DEVICE Value* take(size_t count) {
    Value* const taken = reinterpret_cast<Value*>(base_ + bytes);
    bytes += (count * sizeof(Value) + 15) / 16 * 16;
    return taken;
  }
  char* base_;
};

inline size_t forward_shared_bytes(const ForwardShape& shape) { return ForwardRoom(shape, nullptr).bytes; }

}  // namespace fusedreg::cuda
