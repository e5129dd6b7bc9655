// What a norm of the persistent backward needs to know of other cells: sums over the rows of a unit (batch norm, the
// block's own) or over the units of a row (layer norm, all blocks').
#pragma once

#include "exchange.cuh"
#include "persistent_backward_shape.h"

namespace fusedreg::cuda {

// Rounded before anything is added to it: a mean that is subtracted from what it was taken of must cancel to exactly
// zero where all values are alike, which a product fused into the addition would not.
FUSEDREG_DEVICE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

template <int kUnits>
class BackwardSums {
 public:
  FUSEDREG_DEVICE BackwardSums(const BackwardShape& shape, const BackwardRoom& room, Exchange& exchange)
      : shape_(shape), room_(room), exchange_(exchange) {}

  // Batch norm: rows that take part in the statistics; 0 where these are constants.
  FUSEDREG_DEVICE void set_count(int count) { count_ = count; }

  // One cell's terms: 2, a value and its product with x_hat; or 8, four values and their products. All lanes of a warp
  // come together; a cell that does not run brings zeros. Batch norm adds to what the thread has of its unit; layer
  // norm leaves the block's two numbers of the row.
  template <int N>
  FUSEDREG_DEVICE void collect(float (&over_rows)[8], const float (&terms)[N], int row) const {
    if (shape_.norm == NormKind::Batch) {
#pragma unroll
      for (int k = 0; k < N; ++k) over_rows[k] += terms[k];
      return;
    }
    float pair[2] = {};
#pragma unroll
    for (int k = 0; k < N; ++k) pair[k / (N / 2)] += terms[k];
#pragma unroll
    for (int mask = 1; mask < kUnits; mask *= 2) {
      pair[0] += shuffle_xor(pair[0], mask);
      pair[1] += shuffle_xor(pair[1], mask);
    }
    if (lane() % kUnits == 0 && row < shape_.rows) {
      room_.sums[2 * row] = pair[0];
      room_.sums[2 * row + 1] = pair[1];
    }
  }

  // When all cells have been collected; centred() then knows the means. All threads together.
  template <int N>
  FUSEDREG_DEVICE void finish(float (&over_rows)[8]) {
    if (shape_.norm == NormKind::Layer) {
      exchange_.publish_rows(room_.sums);
      exchange_.sum_rows(room_.totals);
      return;
    }
    // N_c's sums and N_a's have places of their own, so that nobody writes where a slower thread still reads.
    float* const room = room_.sums + (N == 2 ? 0 : 2 * kProductWarps * kUnits);
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
      for (int mask = kUnits; mask < 32; mask *= 2) over_rows[k] += shuffle_xor(over_rows[k], mask);
      if (lane() < kUnits) room[(k * kProductWarps + warp_index()) * kUnits + lane()] = over_rows[k];
    }
    sync_block();
    const int column = thread_index() % kUnits;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < kProductWarps; ++warp) sum += room[(k * kProductWarps + warp) * kUnits + column];
      means_[k] = count_ == 0 ? 0.0f : sum / static_cast<float>(count_);
    }
  }

  // v - mean(v) - x_hat mean(v x_hat), of the N / 2 values' number `which`; layer norm has one mean over all, of
  // `values` values a row.
  template <int N>
  FUSEDREG_DEVICE float centred(int which, int row, float value, float normalised, int64_t values) const {
    float mean = means_[which], slope = means_[N / 2 + which];
    if (shape_.norm == NormKind::Layer) {
      const float inverse = 1.0f / static_cast<float>(values);
      mean = room_.totals[2 * row] * inverse;
      slope = room_.totals[2 * row + 1] * inverse;
    }
    return (value - mean) - normalised * slope;
  }

 private:
  const BackwardShape& shape_;
  const BackwardRoom& room_;
  Exchange& exchange_;
  int count_ = 0;
  float means_[8] = {};  // batch norm: of this thread's unit, values before products
};

}  // namespace fusedreg::cuda
