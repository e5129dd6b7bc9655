// How the persistent forward is cut up, and what a block keeps in shared memory: plain C++, since the choice of a tier
// needs the sizes and the kernel the places.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/params.h"
#include "exchange_layout.h"
#include "product_sizes.h"

namespace fusedreg::cuda {

// Chunks of W that a warp keeps in registers, at 2 registers a thread and unit each: as many as spill nothing. float32
// without matrix instructions reads W seldom (once for 16 rows), and needs the registers for its sums.
FUSEDREG_HOST_DEVICE constexpr int forward_register_chunks(int units, bool matrix_instructions) {
  if (!matrix_instructions) return units == 8 ? 3 : units == 16 ? 2 : 1;
  return units == 32 ? 2 : 4;
}
// Chunks of h that are on their way at a time, at 8 registers a thread each.
FUSEDREG_HOST_DEVICE constexpr int forward_chunks_ahead(int units, bool matrix_instructions) {
  return matrix_instructions && units == 16 ? 2 : forward_register_chunks(units, matrix_instructions);
}

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
  FUSEDREG_HOST_DEVICE constexpr int register_chunks() const {
    return forward_register_chunks(units, matrix_instructions);
  }
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

// Where something stands in a block's shared memory.
template <class Value>
struct Place {
  uint32_t offset = 0;
  FUSEDREG_HOST_DEVICE Value* in(char* shared) const { return reinterpret_cast<Value*>(shared + offset); }
};

// The places of everything, one after another; `bytes` of them. All 16-byte aligned. Made on the host, so that the
// kernel finds offsets among its parameters and holds no pointers.
struct ForwardRoom {
  Place<char> exchange;         // cluster: the exchange's buffers
  Place<char> product;          // W's fragments
  Place<float> partials;        // of the product
  Place<char> staged;           // [copy][row][unit] h as published
  Place<float> hidden;          // [row][unit] h, carried
  Place<float> cell;            // [row][unit] c, carried
  Place<char> outputs;          // [row][unit] y of the step, storage
  Place<float> gates;           // [row][gate][unit] input terms, then the activated gates
  Place<uint16_t> masks;        // [row][unit] what is dropped, and what the row does at this step
  Place<int> lengths;           // [row]
  Place<float> gate_constants;  // [bias, N_a's gain][gate][unit]
  Place<float> cell_constants;  // [N_c's gain, shift][unit]
  Place<float> raw;             // [row][gate][unit] a, where there is a norm
  Place<float> candidates;      // [row][unit] where N_c needs all of them before any goes on
  Place<float> gate_moments;    // batch norm: [mean, variance, scale][column]; layer norm: [row][mean, variance]
  Place<float> cell_moments;
  Place<float> sums;  // batch norm: a number a thread, twice; layer norm: the block's two numbers of each row
  size_t bytes = 0;

  explicit ForwardRoom(const ForwardShape& shape) {
    const size_t rows = static_cast<size_t>(shape.rows), units = static_cast<size_t>(shape.units);
    const size_t storage = static_cast<size_t>(shape.storage_bytes), copies = static_cast<size_t>(shape.copies);
    const size_t gate_values = rows * static_cast<size_t>(shape.gate_stride());
    const bool batch = shape.norm == NormKind::Batch;
    if (shape.clustered) take(exchange, cluster_exchange_bytes(shape.exchange()));
    take(product, ProductSizes::fragment_bytes(shape.columns(), shape.register_chunks(), shape.most_chunks()) +
                      ProductSizes::staging_bytes(shape.matrix_instructions, shape.copies));
    take(partials, ProductSizes::partial_bytes(shape.columns(), shape.rows_per_pass) / sizeof(float));
    take(staged, copies * rows * units * storage);
    take(hidden, rows * units);
    take(cell, rows * units);
    take(outputs, rows * units * storage);
    take(gates, gate_values);
    take(masks, rows * units);
    take(lengths, rows);
    take(gate_constants, 8 * units);
    take(cell_constants, 2 * units);
    if (shape.norm == NormKind::None) return;
    take(raw, gate_values);
    if (shape.norm_cell) take(candidates, rows * units);
    take(gate_moments, batch ? 12 * units : 2 * rows);
    take(cell_moments, batch ? 3 * units : 2 * rows);
    take(sums, batch ? 2 * static_cast<size_t>(kProductThreads) : 2 * rows);
  }

 private:
  template <class Value>
  void take(Place<Value>& place, size_t count) {
    place.offset = static_cast<uint32_t>(bytes);
    bytes += (count * sizeof(Value) + 15) / 16 * 16;
  }
};

}  // namespace fusedreg::cuda
