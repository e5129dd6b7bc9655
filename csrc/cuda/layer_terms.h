// The products over all steps at once that both directions make: r = x̄ W_ihᵀ, and in the backward a = h̄ W̃_hhᵀ.
#pragma once

#include "after_loop.h"
#include "before_loop.h"
#include "products.h"
#include "scratch.h"

namespace fusedreg::cuda {

// What every piece of the driver needs.
struct Caller {
  MaskSeed seed;
  Products& products;
  void* stream;
};

// Bytes `elements` on.
inline void* offset(const void* base, int64_t elements, ScalarType type) {
  return const_cast<char*>(static_cast<const char*>(base) + elements * static_cast<int64_t>(bytes_of(type)));
}

// Gate `gate` of a contiguous (rows, 4H).
inline Matrix gate_columns(const void* gates, ScalarType type, int64_t rows, int64_t hidden_size, int gate) {
  return Matrix::by_rows(offset(gates, gate * hidden_size, type), type, rows, hidden_size, 4 * hidden_size);
}

// What stands in a copy that serves one product after another: a gate's values, in so many groups of rows.
struct Held {
  int gate = -1;
  int64_t groups = 0;
  bool operator==(const Held& other) const { return gate == other.gate && groups == other.groups; }
};

// x̄ as a matrix (T * B, I): the input itself where nothing changes it, else a copy of one gate at a time. In `groups`
// groups (row_groups.h), at most `most_groups`: as many matrices.
class MaskedInputs {
 public:
  // `padding_counts`: what stands in padding reaches a result, so it must be 0.
  MaskedInputs(const LayerInputs& in, bool wanted, bool padding_counts, int64_t most_groups, Scratch& scratch);
  int copies() const { return unties_inputs(in_) ? 4 : 1; }
  Matrix of_gate(int gate, int64_t groups, const Caller& caller);

 private:
  const LayerInputs& in_;
  bool as_it_lies_;  // one group: the input itself
  void* copy_;       // null: not needed
  Held held_;
};

// h̄ as a matrix (T * B, P): a copy of one gate at a time. Groups as above.
class PreviousHidden {
 public:
  PreviousHidden(const LayerInputs& in, bool wanted, Scratch& scratch);
  int copies() const { return unties_hidden(in_) ? 4 : 1; }
  Matrix of_gate(int gate, int64_t groups, const void* hidden, const Caller& caller);

 private:
  const LayerInputs& in_;
  void* copy_;
  Held held_;
};

// Contiguous (T * B, columns) storage, in the order of row_groups.h: a matrix a group.
inline Matrix grouped_rows(const LayerInputs& in, const void* data, int64_t columns, int64_t groups) {
  const int64_t rows = in.steps * (in.rows / groups);
  return Matrix::contiguous(data, in.dtype, rows, columns).repeated(groups, rows * columns);
}

// to, (T * B, 4H) compute = scale source weightᵀ, gate by gate where there are four sources. `source_of(gate)` is a
// Matrix.
template <class SourceOf>
void multiply_terms(const LayerInputs& in, const void* weight, double scale, int copies, const SourceOf& source_of,
                    void* to, const Caller& caller) {
  const int64_t rows = in.steps * in.rows, columns = 4 * in.hidden_size / copies;
  const ScalarType compute = compute_type(in.dtype);
  for (int copy = 0; copy < copies; ++copy) {
    const Matrix source = source_of(copy);
    const void* part = offset(weight, copy * columns * source.columns, in.dtype);
    caller.products.multiply(
        Matrix::by_rows(offset(to, copy * columns, compute), compute, rows, columns, 4 * in.hidden_size), source,
        Matrix::contiguous(part, in.dtype, columns, source.columns).transposed());
  }
  if (scale != 1) scale_elements(compute, to, scale, rows * 4 * in.hidden_size, to, caller.stream);
}

// Of a masked copy of W_hh.
inline int64_t weight_elements(const LayerInputs& in) { return 4 * in.hidden_size * in.projected_size; }

}  // namespace fusedreg::cuda
