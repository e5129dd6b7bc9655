// The step tier: which row stands where at a step, which thread has which cell, and sums over the threads of a block,
// in a fixed order: the same bits run after run.
#pragma once

#include "cell_step.cuh"

namespace fusedreg::cuda {

// One row at one step.
struct StepRow {
  int64_t b, length, t;
  bool valid;       // s < length; t == s in padding
  int64_t results;  // t * B + b
};

FUSEDREG_DEVICE StepRow step_row(const LayerInputs& in, int64_t b, int64_t s) {
  const int64_t length = row_length(in, b), t = position(in, length, s);
  return {b, length, t, s < length, t * in.rows + b};
}

// N_r(r) and the bias: what is added to N_a(a).
template <class Compute>
FUSEDREG_DEVICE void read_terms(const LoopInputs& layer, const StepRow& row, int64_t unit, Compute (&terms)[4]) {
  const int64_t H = layer.in.hidden_size;
  const Compute* bias = static_cast<const Compute*>(layer.bias) + unit;
  read_gates(static_cast<const Compute*>(layer.input_terms), row.results, H, unit, terms);
  for (int gate = 0; gate < 4; ++gate) terms[gate] += bias[gate * H];
}

// In kernels without sums a thread has one of `units` units of a row, and a block units of one row. False beyond the
// last unit.
FUSEDREG_DEVICE bool unit_of_thread(int64_t units, int64_t& b, int64_t& unit) {
  const int blocks_per_row = static_cast<int>((units + block_threads() - 1) / block_threads());
  b = block_index() / blocks_per_row;
  unit = static_cast<int64_t>(block_index() % blocks_per_row) * block_threads() + thread_index();
  return unit < units;
}

// Units of a kernel that has to do with h and c alike.
FUSEDREG_HOST_DEVICE inline int64_t most_units(const LayerInputs& in) {
  return in.hidden_size > in.projected_size ? in.hidden_size : in.projected_size;
}

// A projection's products read u, and on the way back what reaches u W_hr^T, which unlike h nobody else has rounded to
// storage: rounded here, it would be the largest error of all in 16 bits. So it comes in two parts, rounded and rest,
// whose products are added.
constexpr int parts_of(bool narrow) { return narrow ? 2 : 1; }

// `stride`: from the first part to the second.
template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE void store_parts(void* to, int64_t at, int64_t stride, Compute value) {
  Storage* const first = static_cast<Storage*>(to) + at;
  first[0] = narrow<Storage>(value);
  if constexpr (kNarrow<Storage>) first[stride] = narrow<Storage>(value - widen(first[0]));
}

template <class Storage, class Compute = ComputeOf<Storage>>
FUSEDREG_DEVICE Compute sum_of_parts(const Compute* products, int64_t at, int64_t stride) {
  if constexpr (kNarrow<Storage>) return products[at] + products[at + stride];
  return products[at];
}

// The masks' key of a row.
FUSEDREG_DEVICE MaskKey row_key(const LoopInputs& layer, uint32_t layer_direction, int64_t b) {
  return key_of_row(layer.seed, mask_key(layer.seed, layer_direction), b);
}

constexpr int kWarp = 32;

// Replaces each of N values by its sum over the block. `shared` is room for one value of each kind a warp.
template <int N, class Compute>
FUSEDREG_DEVICE void block_sums(Compute (&values)[N], Compute* shared) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    for (int k = 0; k < N; ++k) values[k] += shuffle_xor(values[k], mask);
  }
  if (lane() == 0) {
    for (int k = 0; k < N; ++k) shared[warp_index() * N + k] = values[k];
  }
  sync_block();
  for (int k = 0; k < N; ++k) values[k] = 0;
  for (int warp = 0; warp < block_threads() / kWarp; ++warp) {
    for (int k = 0; k < N; ++k) values[k] += shared[warp * N + k];
  }
  sync_block();  // the room may be used again
}

// Batch norm's blocks are tables of row lanes by columns, each of which is one unit: thread = row lane * kColumns +
// column.
constexpr int kColumns = 8;

// Replaces each of N values by its sum over the row lanes of the same column. `shared` is room for kColumns values of
// each kind a warp.
template <int N, class Compute>
FUSEDREG_DEVICE void column_sums(Compute (&values)[N], Compute* shared) {
  for (int mask = kWarp / 2; mask >= kColumns; mask /= 2) {
    for (int k = 0; k < N; ++k) values[k] += shuffle_xor(values[k], mask);
  }
  const int column = lane() % kColumns;
  if (lane() < kColumns) {
    for (int k = 0; k < N; ++k) shared[(warp_index() * N + k) * kColumns + column] = values[k];
  }
  sync_block();
  for (int k = 0; k < N; ++k) values[k] = 0;
  for (int warp = 0; warp < block_threads() / kWarp; ++warp) {
    for (int k = 0; k < N; ++k) values[k] += shared[(warp * N + k) * kColumns + column];
  }
  sync_block();  // the room may be used again
}

// Threads of a block that has sums to take: the most that its registers allow.
template <class Compute>
constexpr int kMostStepThreads = sizeof(Compute) == 8 ? 256 : 512;

// The most values summed at once, and the shared memory that takes.
constexpr int kMostSums = 8;

template <class Compute>
constexpr size_t sums_bytes(int threads) {
  return static_cast<size_t>(threads / kWarp * kMostSums * kColumns) * sizeof(Compute);
}

// What a thread of batch norm's kernels has: every `stride`th row of one unit. Threads beyond the last unit have no
// rows but take part in the sums, and count the batch's rows as all others do.
struct ColumnShare {
  int64_t unit;
  int64_t rows;
  int first, stride;

  FUSEDREG_DEVICE bool writes_statistics() const { return first == 0 && rows > 0; }
};

FUSEDREG_DEVICE ColumnShare column_share(const LayerInputs& in) {
  const int64_t unit = static_cast<int64_t>(block_index()) * kColumns + thread_index() % kColumns;
  return {unit, unit < in.hidden_size ? in.rows : 0, thread_index() / kColumns, block_threads() / kColumns};
}

// How many rows reach step s: the same for every thread.
template <class Compute>
FUSEDREG_DEVICE int64_t rows_running(const LayerInputs& in, const ColumnShare& share, int64_t s, Compute* shared) {
  if (in.lengths == nullptr) return in.rows;
  Compute count[1] = {0};
  for (int64_t b = share.first; b < in.rows; b += share.stride) {
    if (s < row_length(in, b)) count[0] += 1;
  }
  column_sums(count, shared);
  return static_cast<int64_t>(count[0]);
}

}  // namespace fusedreg::cuda
