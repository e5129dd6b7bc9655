// The micro-kernel that every product is made of: a tile of rows x vectors, accumulated in registers.
#pragma once

#include "simd.h"

namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE {

// The columns of a tile.
template <class Compute>
constexpr int64_t kPanelWidth = kWidth<Compute> * kTileVectors;

// Where a tile's operands lie. For row m, depth k and vector v:
//   left  = a[m * a_row + k * a_depth + v * a_vector]     one value, broadcast
//   right = b[k * b_depth + v * width ...]                one vector
//   out[m * out_row + v * out_vector ...]                 one vector
// a_vector is not 0 only where each of the four gates sees the left side through a mask of its own.
template <class Compute>
struct Tile {
  const Compute* a;
  int64_t a_row, a_depth, a_vector;
  const Compute* b;
  int64_t b_depth;
  int64_t depth;
  Compute* out;
  int64_t out_row, out_vector;
  bool accumulate;  // add to what is in out
  // What the tiles after this one will read, asked for a cache line each step of the depth; null: nothing.
  const Compute* next = nullptr;
};

// `next` for tile number `tile` of those that share a panel of the right side: together they ask for all of the next.
template <class Compute>
FUSEDREG_INLINE const Compute* part_of_next_panel(const Compute* panel, int64_t tile, int64_t depth) {
  constexpr int64_t parts = kTileVectors * kVectorBytes / 64;
  return panel != nullptr && tile < parts ? panel + tile * depth * static_cast<int64_t>(64 / sizeof(Compute)) : nullptr;
}

// Terms summed one after the other before their sum is added to the total: rounding errors grow with the root of this
// and of the number of such sums, not of the whole depth.
constexpr int64_t kSummedInARow = 256;

// The order of summation over k is the same whatever Rows is, so that a result does not depend on the tile in which
// its row happened to fall.
template <class Compute, int Rows, int Vectors, bool Untied>
static void tile_kernel(const Tile<Compute>& tile) {
  using V = Vector<Compute>;
  constexpr int width = kWidth<Compute>;
  const Compute* rows[Rows];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) rows[m] = tile.a + m * tile.a_row;
  const Compute* b = tile.b;
  const char* next = reinterpret_cast<const char*>(tile.next != nullptr ? tile.next : b);
  const int64_t next_step = tile.next != nullptr ? 64 : 0;
  const int64_t a_depth = tile.a_depth, a_vector = tile.a_vector, b_depth = tile.b_depth;
  bool accumulate = tile.accumulate;
  int64_t remaining = tile.depth;
  do {
    const int64_t depth = remaining < kSummedInARow ? remaining : kSummedInARow;
    V accumulators[Rows][Vectors] = {};
    const Compute* const b_end = b + depth * b_depth;
#pragma GCC unroll 1
    for (int64_t offset = 0; b != b_end; b += b_depth, offset += a_depth) {
      __builtin_prefetch(next, 0, 2);
      next += next_step;
      V columns[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) columns[v] = load<Compute>(b + v * width);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        if constexpr (Untied) {
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) {
            accumulators[m][v] += broadcast<Compute>(rows[m][offset + v * a_vector]) * columns[v];
          }
        } else {
          const V value = broadcast<Compute>(rows[m][offset]);
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) accumulators[m][v] += value * columns[v];
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        Compute* out = tile.out + m * tile.out_row + v * tile.out_vector;
        store<Compute>(out, accumulate ? load<Compute>(out) + accumulators[m][v] : accumulators[m][v]);
      }
      rows[m] += depth * a_depth;
    }
    accumulate = true;
    remaining -= depth;
  } while (remaining > 0);
}

template <class Compute, int Vectors, bool Untied>
static void tile_of_vectors(int rows, const Tile<Compute>& tile) {
  static_assert(kTileRows <= 6);
  switch (rows) {
    case 1: return tile_kernel<Compute, 1, Vectors, Untied>(tile);
    case 2: return tile_kernel<Compute, 2, Vectors, Untied>(tile);
    case 3: return tile_kernel<Compute, 3, Vectors, Untied>(tile);
    case 4:
      if constexpr (kTileRows >= 4) return tile_kernel<Compute, 4, Vectors, Untied>(tile);
      return;
    case 5:
      if constexpr (kTileRows >= 5) return tile_kernel<Compute, 5, Vectors, Untied>(tile);
      return;
    case 6:
      if constexpr (kTileRows >= 6) return tile_kernel<Compute, 6, Vectors, Untied>(tile);
      return;
    default: return;
  }
}

// rows: 1 ... kTileRows, vectors: 1 ... kTileVectors.
template <class Compute>
static void multiply_tile(int rows, int vectors, const Tile<Compute>& tile) {
  if (tile.a_vector != 0) return tile_of_vectors<Compute, 4, true>(rows, tile);
  switch (vectors) {
    case 1: return tile_of_vectors<Compute, 1, false>(rows, tile);
    case 2: return tile_of_vectors<Compute, 2, false>(rows, tile);
    case 3: return tile_of_vectors<Compute, 3, false>(rows, tile);
    default: return tile_of_vectors<Compute, 4, false>(rows, tile);
  }
}

// Cuts `count` rows into tiles of nearly the same height, none above kTileRows: body(number, first, rows).
template <class Body>
FUSEDREG_INLINE void for_each_numbered_tile(int64_t count, const Body& body) {
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  for (int64_t n = 0; n < tiles; ++n) {
    const int64_t first = n * count / tiles, last = (n + 1) * count / tiles;
    body(n, first, static_cast<int>(last - first));
  }
}

// The same for a body that does not ask for the number: body(first, rows).
template <class Body>
FUSEDREG_INLINE void for_each_tile(int64_t count, const Body& body) {
  for_each_numbered_tile(count, [&](int64_t, int64_t first, int rows) { body(first, rows); });
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA_NAMESPACE
