// The sizes of the persistent kernels' product (resident_product.cuh), in plain C++: the choice of a tier needs them
// too.
#pragma once

#include <cstddef>

#include "../common/philox.h"

namespace fusedreg::cuda {

constexpr int kProductThreads = 256;
constexpr int kProductWarps = kProductThreads / 32;
constexpr int kTileRows = 16;
constexpr int kChunkBytes = 64;
constexpr int kFragmentBytes = 32 * 16;  // one chunk of eight columns of W

// `columns` is N, `most_chunks` the largest number of chunks that a warp has.
struct ProductSizes {
  // Between the rows of a partial: eight rows that stand so far apart share no bank.
  FUSEDREG_HOST_DEVICE static constexpr int partial_stride(int columns) {
    return columns % 16 == 8 ? columns : columns + 8;
  }
  // Partials of a pass over `rows` rows, a multiple of kTileRows.
  FUSEDREG_HOST_DEVICE static constexpr size_t partial_bytes(int columns, int rows) {
    return sizeof(float) * kProductWarps * static_cast<size_t>(rows) * static_cast<size_t>(partial_stride(columns));
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

}  // namespace fusedreg::cuda
