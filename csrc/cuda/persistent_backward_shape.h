// How the persistent backward is cut up, and what a block keeps in shared memory: plain C++, since the choice of a tier
// needs the sizes and the kernel the places.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/params.h"
#include "exchange_layout.h"
#include "product_sizes.h"

namespace fusedreg::cuda {

// Of a block: 8, 16 or 32, so that a warp holds whole rows of its cells.
constexpr int kMostBackwardUnits = 32;

// Chunks of W that a warp keeps in registers. Each costs 4 registers a thread for every 8 units, and 8 more for what is
// fetched ahead of the product.
FUSEDREG_HOST_DEVICE constexpr int backward_register_chunks(int units) {
  return units == 8 ? 16 : (units == 16 ? 12 : 8);
}

struct BackwardShape {
  bool clustered = false;
  int rows = 0;    // of a batch tile
  int units = 0;   // of a block
  int blocks = 0;  // that share out the units
  int hidden_size = 0;
  int storage_bytes = 0;  // 2 or 4
  bool matrix_instructions = false;
  NormKind norm = NormKind::None;
  bool norm_recurrent = false;
  bool norm_cell = false;

  // K is [gate][padded unit], whole chunks a gate; gate k belongs to warps 2k and 2k + 1, so that untied masks can be
  // put on what each warp has summed.
  FUSEDREG_HOST_DEVICE constexpr int part_bytes() const {
    return (blocks * units * storage_bytes + kChunkBytes - 1) / kChunkBytes * kChunkBytes;
  }
  FUSEDREG_HOST_DEVICE constexpr int chunks_of_gate() const { return part_bytes() / kChunkBytes; }
  FUSEDREG_HOST_DEVICE constexpr int most_chunks() const { return (chunks_of_gate() + 1) / 2; }
  FUSEDREG_HOST_DEVICE constexpr int padded_hidden() const { return part_bytes() / storage_bytes; }

  FUSEDREG_HOST_DEVICE constexpr ExchangeLayout exchange() const {
    ExchangeLayout layout{};
    layout.blocks = blocks;
    layout.lines = rows;
    // In shared memory rows stand an odd multiple of 64 bytes apart: the product's reads are free of bank conflicts.
    layout.line_bytes = 4 * part_bytes() + (clustered ? 64 : 0);
    layout.slice_bytes = units * storage_bytes;
    layout.rows = norm == NormKind::Layer && (norm_recurrent || norm_cell) ? rows : 0;
    layout.parts = 4;
    layout.part_bytes = part_bytes();
    return layout;
  }

  FUSEDREG_HOST_DEVICE constexpr int tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  // Tiles whose partial sums are in shared memory at a time.
  FUSEDREG_HOST_DEVICE constexpr int tiles_of_pass() const {
    constexpr size_t room = 48 * 1024;
    const int fitting = static_cast<int>(room / ProductSizes::partial_bytes(units, kTileRows));
    return fitting < tiles() ? fitting : tiles();
  }
};

// Values of a cell that wait for the sums of a norm; see PersistentBackward.
constexpr int kTraceValues = 8;

// The places of everything, one after another from `base` on; `bytes` of them. All 16-byte aligned.
struct BackwardRoom {
  char* exchange = nullptr;         // cluster: the exchange's buffers
  char* product = nullptr;          // W's fragments
  float* partials = nullptr;        // of the product
  char* staged = nullptr;           // [row][gate][unit] da as published
  float* hidden = nullptr;          // [row][unit] dh, carried
  float* cell = nullptr;            // [row][unit] dc, carried
  uint16_t* masks = nullptr;        // [row][unit] what is dropped, and what the row does at this step
  int* lengths = nullptr;           // [row]
  float* gate_constants = nullptr;  // [bias, N_a's gain][gate][unit]
  float* cell_constants = nullptr;  // [N_c's gain, shift][unit]
  float* gate_moments = nullptr;    // [mean, scale, spread][column or row]
  float* cell_moments = nullptr;    // [mean, scale, spread][column or row]
  float* trace = nullptr;           // [value][row][unit]
  float* sums = nullptr;            // batch norm: room for sums over rows; layer norm: a row's two numbers
  float* totals = nullptr;          // layer norm: the same, of all blocks
  size_t bytes = 0;

  FUSEDREG_HOST_DEVICE BackwardRoom(const BackwardShape& shape, char* base) : base_(base) {
    const size_t rows = static_cast<size_t>(shape.rows), units = static_cast<size_t>(shape.units);
    const bool batch = shape.norm == NormKind::Batch, layer = shape.norm == NormKind::Layer;
    const bool trace_cell = shape.norm_cell || shape.norm_recurrent;
    const int register_chunks = backward_register_chunks(shape.units);
    if (shape.clustered) exchange = take<char>(cluster_exchange_bytes(shape.exchange()));
    product = take<char>(ProductSizes::fragment_bytes(shape.units, register_chunks, shape.most_chunks()) +
                         ProductSizes::staging_bytes(shape.matrix_instructions, 1));
    partials = take<float>(ProductSizes::partial_bytes(shape.units, shape.tiles_of_pass() * kTileRows) / sizeof(float));
    staged = take<char>(rows * 4 * units * static_cast<size_t>(shape.storage_bytes));
    hidden = take<float>(rows * units);
    cell = take<float>(rows * units);
    masks = take<uint16_t>(rows * units);
    lengths = take<int>(rows);
    gate_constants = take<float>(8 * units);
    if (shape.norm_cell) cell_constants = take<float>(2 * units);
    if (shape.norm_recurrent) gate_moments = take<float>(3 * (batch ? 4 * units : rows));
    if (shape.norm_cell) cell_moments = take<float>(3 * (batch ? units : rows));
    if (trace_cell) trace = take<float>(kTraceValues * rows * units);
    // Batch norm sums 2 numbers for N_c and then 8 for N_a, warp by warp, in places of their own.
    if (batch) sums = take<float>(10 * kProductWarps * units);
    if (layer) {
      sums = take<float>(2 * rows);
      totals = take<float>(2 * rows);
    }
  }

 private:
  template <class Value>
  FUSEDREG_HOST_DEVICE Value* take(size_t count) {
    Value* const taken = base_ == nullptr ? nullptr : reinterpret_cast<Value*>(base_ + bytes);
    bytes += (count * sizeof(Value) + 15) / 16 * 16;
    return taken;
  }
  char* base_;
};

inline size_t backward_shared_bytes(const BackwardShape& shape) { return BackwardRoom(shape, nullptr).bytes; }

}  // namespace fusedreg::cuda
