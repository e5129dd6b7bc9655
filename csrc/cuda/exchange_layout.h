// The sizes of what blocks exchange (exchange.cuh), in plain C++: the choice of a tier needs them too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/philox.h"

namespace fusedreg::cuda {

struct ExchangeLayout {
  int blocks;          // that exchange with one another: the grid's, or one cluster's
  int lines;           // of a buffer
  int line_bytes;      // a multiple of 64, at least what the parts take
  int slice_bytes;     // one block's share of a part, a multiple of 16
  int rows;            // of the sums over rows; 0 where there are none
  int parts = 1;       // of a line
  int part_bytes = 0;  // from one part to the next, a multiple of 64, at least blocks * slice_bytes
};

constexpr int kFlagWords = 32;  // a flag alone on its 128-byte line, so that polls of one
                                // do not delay the store to another

FUSEDREG_HOST_DEVICE constexpr size_t exchange_buffers_bytes(const ExchangeLayout& layout) {
  return size_t{2} * static_cast<size_t>(layout.lines) * static_cast<size_t>(layout.line_bytes);
}
FUSEDREG_HOST_DEVICE constexpr size_t exchange_rows_bytes(const ExchangeLayout& layout) {
  const size_t bytes = size_t{2} * static_cast<size_t>(layout.rows) * static_cast<size_t>(layout.blocks) * 8;
  return (bytes + 15) / 16 * 16;
}
// In a cluster: of each block's shared memory.
FUSEDREG_HOST_DEVICE constexpr size_t cluster_exchange_bytes(const ExchangeLayout& layout) {
  return exchange_buffers_bytes(layout) + exchange_rows_bytes(layout);
}
// In a grid: of device memory for each group of `blocks` blocks, 128-byte aligned, which must be all zeros when the
// kernel starts.
FUSEDREG_HOST_DEVICE constexpr size_t grid_exchange_bytes(const ExchangeLayout& layout) {
  const size_t flags = static_cast<size_t>(layout.blocks) * kFlagWords * sizeof(uint32_t);
  return flags + (cluster_exchange_bytes(layout) + 127) / 128 * 128;
}

}  // namespace fusedreg::cuda
