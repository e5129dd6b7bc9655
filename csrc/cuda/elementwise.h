// How kernels without any sharing between threads are laid out: a thread an element, or a thread a column of rows.
#pragma once

#include <cstdint>

#include "../common/philox.h"
#include "device.h"

namespace fusedreg::cuda {

constexpr int kElementThreads = 256;

FUSEDREG_DEVICE int64_t element_index() {
  return static_cast<int64_t>(block_index()) * block_threads() + thread_index();
}

FUSEDREG_HOST_DEVICE constexpr int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

// A thread for each of `elements`, times `pieces_y` along y, of which there are at most 65,535.
inline Launch element_launch(int64_t elements, void* stream, int64_t pieces_y = 1) {
  Launch launch;
  launch.grid_x = static_cast<int>(pieces(elements, kElementThreads));
  launch.grid_y = static_cast<int>(pieces_y);
  launch.threads = kElementThreads;
  launch.stream = stream;
  return launch;
}

// Rows a thread goes through, where a long axis is cut into pieces along y: at least `least`, at most `most` pieces.
inline int64_t piece_of(int64_t rows, int64_t least, int64_t most) {
  const int64_t needed = pieces(rows, most);
  return needed > least ? needed : least;
}

}  // namespace fusedreg::cuda
