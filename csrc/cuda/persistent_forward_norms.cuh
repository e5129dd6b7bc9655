// N_a and N_c in the persistent forward. Batch norm: a block has all rows of its columns, so that their statistics are
// its own. Layer norm: a row's statistics are put together from all blocks', by one more exchange.
#pragma once

#include "exchange.cuh"
#include "persistent_forward_block.cuh"

// As everywhere in the loop over the steps, indices of threads are opaque() and loops are not unrolled: registers are
// for W_hh.
namespace fusedreg::cuda {

// Batch norm keeps [mean, variance, scale][column], the scale times the gain; layer norm [row][mean, variance].

// One gate's a of a cell through N_a, without its shift.
template <int U>
FUSEDREG_DEVICE float normalised_gate(const ForwardBlock<U>& block, const ForwardCell<U>& cell, int gate, float a) {
  const float* const moments = block.gate_moments();
  const int column = gate * U + cell.unit;
  if (block.params.shape.norm == NormKind::Batch) return (a - moments[column]) * moments[8 * U + column];
  const Moments<float> of_row{moments[2 * cell.row], moments[2 * cell.row + 1], false};
  return (a - of_row.mean) * of_row.scale(block.params.loop.layer.in.norm_eps) * block.gate_constants()[4 * U + column];
}

template <int U>
FUSEDREG_DEVICE float normalised_cell(const ForwardBlock<U>& block, const ForwardCell<U>& cell, float candidate) {
  const float* const moments = block.cell_moments();
  const float gain = block.cell_constants()[cell.unit], shift = block.cell_constants()[U + cell.unit];
  if (block.params.shape.norm == NormKind::Batch) {
    return (candidate - moments[cell.unit]) * moments[2 * U + cell.unit] + shift;
  }
  const Moments<float> of_row{moments[2 * cell.row], moments[2 * cell.row + 1], false};
  return (candidate - of_row.mean) * of_row.scale(block.params.loop.layer.in.norm_eps) * gain + shift;
}

template <int U>
FUSEDREG_DEVICE void keep_column(const ForwardBlock<U>& block, float* moments, int columns, int column, float gain,
                                 const Moments<float>& of_column) {
  moments[column] = of_column.mean;
  moments[columns + column] = of_column.variance;
  moments[2 * columns + column] = of_column.scale(block.params.loop.layer.in.norm_eps) * gain;
}

// The population's moments of step s, where they are what it is normalised with: long before they are needed.
template <int U>
FUSEDREG_DEVICE void load_population(const ForwardBlock<U>& block, int s) {
  const LoopInputs& layer = block.params.loop.layer;
  if (takes_batch_statistics(layer.in.options, block.count)) return;
  const int thread = opaque(thread_index()), own = thread % U;
  if (own >= block.units) return;
  if (block.params.shape.norm_recurrent && thread < 4 * U) {
    const int64_t column = thread / U * layer.in.hidden_size + block.first_unit + own;
    keep_column(block, block.gate_moments(), 4 * U, thread, block.gate_constants()[4 * U + thread],
                recurrent_population<float>(layer, s, column));
  }
  if (block.params.shape.norm_cell && thread < U) {
    keep_column(block, block.cell_moments(), U, own, block.cell_constants()[own],
                cell_population<float>(layer, s, block.first_unit + own));
  }
}

// Mean and biased variance of each of `kColumns` columns over the rows that take part in step s, in two passes. Threads
// of one column sum the rows in turn; their sums are added in a fixed order.
template <int kColumns, int U>
FUSEDREG_DEVICE void take_column_moments(const ForwardBlock<U>& block, const float* values, int stride, int s,
                                         const float* gains, float* moments) {
  constexpr int kGroups = kProductThreads / kColumns;
  const int thread = opaque(thread_index()), column = thread % kColumns, group = thread / kColumns;
  const float share = 1.0f / static_cast<float>(block.count);
  float* const sums = block.sums();
  const auto total = [&](const float* parts) {
    float sum = 0;
#pragma unroll 4
    for (int other = 0; other < kGroups; ++other) sum += parts[other * kColumns + column];
    return sum;
  };
  sync_block();  // the values are whole
  float sum = 0;
#pragma unroll 4
  for (int row = group; row < block.rows; row += kGroups) {
    if (s < block.length(row)) sum += values[row * stride + column];
  }
  sums[thread] = sum;
  sync_block();
  const float mean = total(sums) * share;
  float squares = 0;
#pragma unroll 4
  for (int row = group; row < block.rows; row += kGroups) {
    if (s >= block.length(row)) continue;
    const float distance = values[row * stride + column] - mean;
    squares += distance * distance;
  }
  sums[kProductThreads + thread] = squares;
  sync_block();
  if (group == 0) {
    keep_column(block, moments, kColumns, column, gains[column], {mean, total(sums + kProductThreads) * share, false});
  }
  sync_block();
}

// Mean and biased variance of each row over all blocks' columns. Of `groups` x U columns that stand together in a row
// this block has the first `units` of each U.
template <int U>
FUSEDREG_DEVICE void take_row_moments(const ForwardBlock<U>& block, Exchange& exchange, const float* values, int stride,
                                      int groups, float* moments) {
  const int columns = groups * U;
  const float share = 1.0f / static_cast<float>(groups * block.units);
  sync_block();  // the values are whole
  for (int row = opaque(warp_index()); row < block.rows; row += kProductWarps) {
    const auto over_columns = [&](const auto& term) {
      float sum = 0;
      for (int column = opaque(lane()); column < columns; column += 32) {
        if (column % U < block.units) sum += term(values[row * stride + column]);
      }
      for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
      return sum;
    };
    const float mean = over_columns([](float value) { return value; }) * share;
    const float squares = over_columns([mean](float value) { return (value - mean) * (value - mean); });
    if (lane() == 0) {
      block.sums()[2 * row] = mean;
      block.sums()[2 * row + 1] = squares;
    }
  }
  exchange.publish_rows(block.sums());
  exchange.combine_rows(columns, groups * block.params.shape.hidden_size, moments);
}

template <int U>
FUSEDREG_DEVICE void take_gate_moments(const ForwardBlock<U>& block, Exchange& exchange, int s) {
  if (block.params.shape.norm == NormKind::Layer) {
    return take_row_moments(block, exchange, block.raw(), ForwardBlock<U>::kGateStride, 4, block.gate_moments());
  }
  if (!takes_batch_statistics(block.params.loop.layer.in.options, block.count)) return;
  take_column_moments<4 * U>(block, block.raw(), ForwardBlock<U>::kGateStride, s, block.gate_constants() + 4 * U,
                             block.gate_moments());
}

template <int U>
FUSEDREG_DEVICE void take_cell_moments(const ForwardBlock<U>& block, Exchange& exchange, int s) {
  if (block.params.shape.norm == NormKind::Layer) {
    return take_row_moments(block, exchange, block.candidates(), U, 1, block.cell_moments());
  }
  if (!takes_batch_statistics(block.params.loop.layer.in.options, block.count)) return;
  take_column_moments<U>(block, block.candidates(), U, s, block.cell_constants(), block.cell_moments());
}

// The statistics of step s as results; zeros where no row reaches it.
template <int U>
FUSEDREG_DEVICE void write_batch_moments(const ForwardBlock<U>& block, int s, bool reached) {
  const LayerOutputs& out = block.params.loop.out;
  const int64_t hidden_size = block.params.shape.hidden_size;
  const int thread = opaque(thread_index()), own = thread % U;
  if (own >= block.units) return;
  if (block.params.shape.norm_recurrent && thread < 4 * U) {
    const float* const moments = block.gate_moments() + thread;
    store_moments<float>(out.recurrent_statistics, s, 4 * hidden_size,
                         thread / U * hidden_size + block.first_unit + own, reached, {moments[0], moments[4 * U]});
  }
  if (block.params.shape.norm_cell && thread < U) {
    const float* const moments = block.cell_moments() + thread;
    store_moments<float>(out.cell_statistics, s, hidden_size, block.first_unit + own, reached,
                         {moments[0], moments[U]});
  }
}

// The same of layer norm: every block has them, the first one writes them.
template <int U>
FUSEDREG_DEVICE void write_layer_moments(const ForwardBlock<U>& block, int s, bool reached) {
  if (block.own_block != 0) return;
  const LayerInputs& in = block.params.loop.layer.in;
  const LayerOutputs& out = block.params.loop.out;
  for (int row = opaque(thread_index()); row < block.rows; row += kProductThreads) {
    const int64_t length = block.length(row), b = block.first_row + row;
    const int64_t t = position(in, length, s);
    const bool runs = reached && s < length;
    if (block.params.shape.norm_recurrent) {
      const float* const moments = block.gate_moments() + 2 * row;
      store_moments<float>(out.recurrent_statistics, t, in.rows, b, runs, {moments[0], moments[1]});
    }
    if (block.params.shape.norm_cell) {
      const float* const moments = block.cell_moments() + 2 * row;
      store_moments<float>(out.cell_statistics, t, in.rows, b, runs, {moments[0], moments[1]});
    }
  }
}

}  // namespace fusedreg::cuda
