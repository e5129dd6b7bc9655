// How the persistent backward is cut up, and what a block keeps in shared memory: plain C++, since the choice of a tier
// needs the sizes and the kernel the places.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/params.h"
#include "exchange_layout.h"
#include "product_sizes.h"

namespace fusedreg::cuda {

// Chunks of W that a warp keeps in registers, 4 registers a thread for every 8 units, and chunks of da that are on
// their way at a time, 8 registers each: as many as leave none to be spilled.
FUSEDREG_HOST_DEVICE constexpr int backward_register_chunks(int units, bool matrix_instructions) {
  if (matrix_instructions) return units == 32 ? 5 : 8;
  return units == 8 ? 8 : 4;
}
FUSEDREG_HOST_DEVICE constexpr int backward_chunks_ahead(int units, bool matrix_instructions) {
  if (matrix_instructions) return units == 32 ? 5 : 8;
  return units == 32 ? 2 : 4;
}

struct BackwardShape {
  bool clustered = false;
  int rows = 0;    // of a batch tile
  int units = 0;   // of a block: 8, 16 or 32, so that a warp holds whole rows of its cells
  int blocks = 0;  // that share out the units
  int hidden_size = 0;
  int storage_bytes = 0;  // 2 or 4
  bool matrix_instructions = false;
  NormKind norm = NormKind::None;
  bool norm_recurrent = false;
  bool norm_cell = false;
  bool activated = false;   // the forward kept the gates after their activations
  bool grad_cells = false;  // a gradient of all cells may come in

  // K is [gate][padded unit], whole chunks a gate; gate k belongs to warps 2k and 2k + 1, so that untied masks can be
  // put on what each warp has summed.
  FUSEDREG_HOST_DEVICE constexpr int part_bytes() const {
    return (blocks * units * storage_bytes + kChunkBytes - 1) / kChunkBytes * kChunkBytes;
  }
  FUSEDREG_HOST_DEVICE constexpr int chunks_of_gate() const { return part_bytes() / kChunkBytes; }
  FUSEDREG_HOST_DEVICE constexpr int most_chunks() const { return (chunks_of_gate() + 1) / 2; }
  FUSEDREG_HOST_DEVICE constexpr int padded_hidden() const { return part_bytes() / storage_bytes; }

  FUSEDREG_HOST_DEVICE constexpr int register_chunks() const {
    return backward_register_chunks(units, matrix_instructions);
  }

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
    constexpr size_t room = 24 * 1024;
    const int fitting = static_cast<int>(room / ProductSizes::partial_bytes(units, kTileRows));
    return fitting < tiles() ? fitting : tiles();
  }
};

// Values of a cell in `trace`; see BackwardCells.
constexpr int kTraceOfTerms = 4;  // without a norm
constexpr int kTraceOfNorm = 8;

// Where everything is, in bytes from the beginning of shared memory; `bytes` in all. -1: not there.
struct BackwardRoom {
  int exchange = -1;        // cluster: the exchange's buffers
  int product = -1;         // W's fragments
  int partials = -1;        // of the product
  int staged = -1;          // [row][gate][unit] da as published
  int hidden = -1;          // [row][unit] dh, carried
  int cell = -1;            // [row][unit] dc, carried
  int masks = -1;           // [row][unit] 16 bits: what is dropped, and where the row begins
  int lengths = -1;         // [row]
  int gate_constants = -1;  // [bias, N_a's gain][gate][unit]
  int cell_constants = -1;  // [N_c's gain, shift][unit]
  int gate_moments = -1;    // [mean, scale, spread][column or row]
  int cell_moments = -1;    // [mean, scale, spread][column or row]
  // What the step before reads of device memory, fetched while da travels:
  int gates = -1;          // [gate][row][unit] as the forward kept them, or the raw a
  int previous_cell = -1;  // [row][unit]
  int grad_output = -1;    // [row][unit]
  int grad_cells = -1;     // [row][unit]
  int trace = -1;          // [value][row][unit], unless the gates were kept activated; the first four are fetched too
  int sums = -1;           // batch norm: a warp's sums over rows; layer norm: the block's two numbers of each row
  int totals = -1;         // layer norm: the same, of all blocks
  size_t bytes = 0;
};

inline BackwardRoom backward_room(const BackwardShape& shape) {
  BackwardRoom room;
  const auto take = [&](size_t bytes) {
    const int taken = static_cast<int>(room.bytes);
    room.bytes += (bytes + 15) / 16 * 16;
    return taken;
  };
  const size_t rows = static_cast<size_t>(shape.rows), units = static_cast<size_t>(shape.units), value = sizeof(float);
  const bool batch = shape.norm == NormKind::Batch, layer = shape.norm == NormKind::Layer;
  if (shape.clustered) room.exchange = take(cluster_exchange_bytes(shape.exchange()));
  room.product = take(ProductSizes::fragment_bytes(shape.units, shape.register_chunks(), shape.most_chunks()) +
                      ProductSizes::staging_bytes(shape.matrix_instructions, 1));
  room.partials = take(ProductSizes::partial_bytes(shape.units, shape.tiles_of_pass() * kTileRows));
  room.staged = take(rows * 4 * units * static_cast<size_t>(shape.storage_bytes));
  room.hidden = take(rows * units * value);
  room.cell = take(rows * units * value);
  room.masks = take(rows * units * sizeof(uint16_t));
  room.lengths = take(rows * sizeof(int));
  room.gate_constants = take(8 * units * value);
  if (shape.norm_cell) room.cell_constants = take(2 * units * value);
  if (shape.norm_recurrent) room.gate_moments = take(3 * (batch ? 4 * units : rows) * value);
  if (shape.norm_cell) room.cell_moments = take(3 * (batch ? units : rows) * value);
  const size_t storage = static_cast<size_t>(shape.storage_bytes);
  room.gates = take(4 * rows * units * (shape.activated ? storage : value));
  room.previous_cell = take(rows * units * value);
  room.grad_output = take(rows * units * storage);
  if (shape.grad_cells) room.grad_cells = take(rows * units * value);
  if (!shape.activated) {
    room.trace = take((shape.norm == NormKind::None ? kTraceOfTerms : kTraceOfNorm) * rows * units * value);
  }
  // Batch norm sums 2 numbers for N_c and then 8 for N_a, in places of their own.
  if (batch) room.sums = take(10 * kProductWarps * units * value);
  if (layer) {
    room.sums = take(2 * rows * value);
    room.totals = take(2 * rows * value);
  }
  return room;
}

inline size_t backward_shared_bytes(const BackwardShape& shape) { return backward_room(shape).bytes; }

}  // namespace fusedreg::cuda
