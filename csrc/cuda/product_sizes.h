// The sizes of the persistent kernels' product (resident_product.cuh), in plain C++: the choice of a tier needs them
// too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/philox.h"

namespace fusedreg::cuda {

constexpr int kProductThreads = 256;
constexpr int kProductWarps = kProductThreads / 32;
constexpr int kTileRows = 16;
constexpr int kChunkBytes = 64;
constexpr int kFragmentBytes = 32 * 16;  // one chunk of eight columns of W

// `columns` is N, `most_chunks` the largest number of chunks that a warp has.
struct ProductSizes {
  // Partials of a pass over `rows` rows, a multiple of kTileRows.
  FUSEDREG_HOST_DEVICE static constexpr size_t partial_bytes(int columns, int rows) {
    return sizeof(float) * kProductWarps * static_cast<size_t>(rows) * static_cast<size_t>(columns);
  }
  // What a row's columns are exclusive-ored with, in eights of them, so that no two lanes meet in a bank: neither where
  // lanes leave pairs of sums of four rows (half a warp at a time: 4 t + {0, 1} of rows g), nor where they read 32
  // columns of one row, 16 of each of two, or 8 of each of four. Rows g and g + 8 have the same.
  FUSEDREG_HOST_DEVICE static constexpr int partial_swizzle(int columns, int row) {
    return columns % 32 == 0 ? (row % 2 * 2 + row / 2 % 2) * 8 : columns == 16 ? row / 2 % 2 * 8 : 0;
  }
  // What the product itself keeps in shared memory: fragments beyond the register chunks, and float32's tiles.
  FUSEDREG_HOST_DEVICE static constexpr size_t fragment_bytes(int columns, int register_chunks, int most_chunks) {
    const int beyond = most_chunks > register_chunks ? most_chunks - register_chunks : 0;
    return static_cast<size_t>(kProductWarps) * static_cast<size_t>(beyond) * static_cast<size_t>(columns / 8) *
           kFragmentBytes;
  }
  // Copies stand 16 bytes off a multiple of the banks, since lanes of different gates read them at the same time.
  static constexpr int kStagedCopy = kTileRows * kChunkBytes + 16;
  FUSEDREG_HOST_DEVICE static constexpr size_t staging_bytes(bool matrix_instructions, int copies) {
    return matrix_instructions ? 0 : static_cast<size_t>(kProductWarps) * static_cast<size_t>(copies) * kStagedCopy;
  }
};

// What partial_swizzle promises, of a tile's partials: `pairs` as they are left, else columns of `units` units as they
// are read, a warp at a time.
constexpr bool partials_share_no_bank(int columns, int units, bool pairs) {
  const int lanes = pairs ? 16 : 32;
  for (int first = 0; first < kTileRows * units; first += lanes) {
    uint32_t taken = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      const int row = pairs ? first / lanes * 4 % kTileRows + lane / 4 : (first + lane) / units;
      const int n = pairs ? lane % 4 * 2 : (first + lane) % units;
      const int bank = (row * columns + (n ^ ProductSizes::partial_swizzle(columns, row))) % 32;
      const uint32_t banks = (pairs ? uint32_t{3} : uint32_t{1}) << bank;
      if ((taken & banks) != 0) return false;
      taken |= banks;
    }
  }
  return true;
}
// Backward, a block's columns are its units; forward four times as many.
static_assert(partials_share_no_bank(8, 8, true) && partials_share_no_bank(8, 8, false));
static_assert(partials_share_no_bank(16, 16, true) && partials_share_no_bank(16, 16, false));
static_assert(partials_share_no_bank(32, 32, true) && partials_share_no_bank(32, 32, false));
static_assert(partials_share_no_bank(32, 8, true) && partials_share_no_bank(32, 8, false));
static_assert(partials_share_no_bank(64, 16, true) && partials_share_no_bank(64, 16, false));
static_assert(partials_share_no_bank(128, 32, true) && partials_share_no_bank(128, 32, false));

}  // namespace fusedreg::cuda
