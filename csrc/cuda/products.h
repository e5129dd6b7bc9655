// The one thing that is asked of a library: a matrix product. Whoever calls the layer brings it, so that handles,
// workspaces, the TF32 setting and the capture of graphs are the caller's framework's own.
#pragma once

#include <cstdint>

#include "../common/params.h"

namespace fusedreg::cuda {

// A matrix in device memory: strides in elements, one of them 1, the other at least the length of what it steps over.
// Or `count` of them, each `count_stride` elements after the one before: as a factor, 0 is the same one each time.
struct Matrix {
  const void* data;
  ScalarType type;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
  int64_t count = 1, count_stride = 0;

  // Rows that follow one another in memory, the first `columns` elements of each.
  static Matrix by_rows(const void* data, ScalarType type, int64_t rows, int64_t columns, int64_t row_stride) {
    return {data, type, rows, columns, row_stride, 1};
  }
  static Matrix contiguous(const void* data, ScalarType type, int64_t rows, int64_t columns) {
    return by_rows(data, type, rows, columns, columns);
  }
  Matrix transposed() const { return {data, type, columns, rows, column_stride, row_stride, count, count_stride}; }
  Matrix repeated(int64_t times, int64_t stride) const {
    Matrix many = *this;
    many.count = times;
    many.count_stride = stride;
    return many;
  }
};

class Products {
 public:
  // out = a b, overwriting `out`, which stands apart from both: out (M, N), a (M, K), b (K, N); of several matrices,
  // as many on all sides, each with its own. Sums are float32 or wider. `a` and `b` are of one type; `out` is of that
  // type too, or float32 beside 16-bit factors. Works on the caller's current stream, without synchronisation. Throws
  // std::runtime_error.
  virtual void multiply(const Matrix& out, const Matrix& a, const Matrix& b) = 0;

 protected:
  ~Products() = default;
};

}  // namespace fusedreg::cuda
