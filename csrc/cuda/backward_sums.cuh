// What a norm of the persistent backward needs to know of other cells: sums over the rows of a unit (batch norm, the
// block's own) or over the units of a row (layer norm, all blocks').
#pragma once

#include "exchange.cuh"
#include "loop.h"
#include "masks.cuh"
#include "persistent_backward_shape.h"

namespace fusedreg::cuda {

// What the kernel is given. What the host can compute, it does: kernels read it as constants, in no register.
struct PersistentBackwardParams {
  BackwardLoop loop;
  LoopMasks<float> masks;
  BackwardShape shape;
  BackwardRoom room;
  ExchangeLayout exchange;

  template <class Value>
  FUSEDREG_DEVICE Value* shared(int place) const {
    return reinterpret_cast<Value*>(dynamic_shared() + place);
  }
};

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
  FUSEDREG_DEVICE explicit BackwardSums(const PersistentBackwardParams& params) : params_(params) {}

  // One cell's terms: 2, a value and its product with x_hat; or 8, four values and their products. All lanes of a warp
  // come together; a cell that does not run brings zeros. Batch norm adds to what the thread has of its unit; layer
  // norm leaves the block's two numbers of the row.
  template <int N>
  FUSEDREG_DEVICE void collect(float (&over_rows)[8], const float (&terms)[N], int row) const {
    if (params_.shape.norm == NormKind::Batch) {
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
    if (lane() % kUnits == 0 && row < params_.shape.rows) {
      float* const sums = params_.shared<float>(params_.room.sums) + 2 * row;
      sums[0] = pair[0];
      sums[1] = pair[1];
    }
  }

  // When all cells have been collected, all threads together. Batch norm: makes means over `count` rows of the sums;
  // zeros where the statistics are constants, and `count` 0.
  template <int N>
  FUSEDREG_DEVICE void finish(float (&over_rows)[8], int count, Exchange& exchange) const {
    if (params_.shape.norm == NormKind::Layer) {
      exchange.publish_rows(params_.shared<float>(params_.room.sums));
      exchange.sum_rows(params_.shared<float>(params_.room.totals));
      return;
    }
    // N_c's sums and N_a's have places of their own, so that nobody writes where a slower thread still reads.
    float* const room = params_.shared<float>(params_.room.sums) + (N == 2 ? 0 : 2 * kProductWarps * kUnits);
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
      for (int mask = kUnits; mask < 32; mask *= 2) over_rows[k] += shuffle_xor(over_rows[k], mask);
      if (lane() < kUnits) room[(k * kProductWarps + warp_index()) * kUnits + lane()] = over_rows[k];
    }
    sync_block();
    const int column = opaque(thread_index()) % kUnits;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < kProductWarps; ++warp) sum += room[(k * kProductWarps + warp) * kUnits + column];
      over_rows[k] = count == 0 ? 0.0f : sum / static_cast<float>(count);
    }
  }

  // v - mean(v) - x_hat mean(v x_hat). Batch norm is given the means; layer norm has them of the row, of `values`
  // values.
  FUSEDREG_DEVICE float centred(float mean, float slope, int row, float value, float normalised, int64_t values) const {
    if (params_.shape.norm == NormKind::Layer) {
      const float inverse = 1.0f / static_cast<float>(values);
      const float* const totals = params_.shared<float>(params_.room.totals) + 2 * row;
      mean = totals[0] * inverse;
      slope = totals[1] * inverse;
    }
    return (value - mean) - normalised * slope;
  }

 private:
  const PersistentBackwardParams& params_;
};

}  // namespace fusedreg::cuda
