// The whole backward loop in one launch: semantics.md section 7, steps last to first.
//
// A block owns the four gates of `units` units for every row of its batch tile. It carries their dh and dc in shared
// memory and holds the matching columns of W_hh for the whole sequence (resident_product.cuh). At a step:
//
//   1. cells: from dh, dc and the gradient of y through zoneout, tanh and N_c to dz (persistent_backward_cell.cuh).
//   2. da, which is dz through N_a, is published to the other blocks; while it travels, it is written to the results,
//      the next step's masks are drawn, and what that step reads is fetched.
//   3. dh_{s-1} = m_h (da W_hh) + zoneout's share, from everybody's da.
//
// A thread has the same cells in all of this, and always of one unit: what only it writes and reads needs no barrier.
#pragma once

#include "persistent_backward_cell.cuh"
#include "resident_product.cuh"

namespace fusedreg::cuda {

template <class Mode, int NT>
class PersistentBackward {
  using Storage = typename Mode::Storage;
  static constexpr int kUnits = NT * 8;
  using Product = ResidentProduct<Mode, NT, backward_register_chunks(kUnits, Mode::kMatrixInstructions),
                                  backward_chunks_ahead(kUnits, Mode::kMatrixInstructions)>;
  using Cells = BackwardCells<Mode, NT>;

 public:
  FUSEDREG_DEVICE explicit PersistentBackward(const PersistentBackwardParams& params)
      : params_(params),
        shape_(params.shape),
        exchange_(params.exchange, params.shape.clustered,
                  params.shape.clustered ? params.shared<void>(params.room.exchange) : params.loop.scratch),
        product_(params.shared<char>(params.room.product), params.shape.most_chunks(), first_chunk(), chunks()),
        cells_(params, exchange_.own_block()) {}

  FUSEDREG_DEVICE void run() {
    exchange_.begin();
    cells_.set_up();
    load_weight();
    const int longest = cells_.longest();
    for (int s = static_cast<int>(cells_.in.steps) - 1; s >= longest; --s) cells_.pass_step(s);
    if (longest > 0) cells_.prepare(longest - 1);
    wait_for_fetched();
    sync_block();
    for (int s = longest - 1; s >= 0; --s) {
      cells_.step(s, exchange_);
      const bool wanted = s > 0 || cells_.loop.grad_initial_hidden != nullptr;
      if (wanted) exchange_.publish(params_.shared<char>(params_.room.staged));
      cells_.write_results(s);
      cells_.prepare(s - 1);
      if (wanted) to_hidden(s);
    }
    cells_.write_initial();
  }

 private:
  // This warp's part of K: half of a gate.
  FUSEDREG_DEVICE int first_chunk() const {
    return warp_index() / 2 * shape_.chunks_of_gate() + warp_index() % 2 * shape_.most_chunks();
  }
  FUSEDREG_DEVICE int chunks() const {
    return warp_index() % 2 == 0 ? shape_.most_chunks() : shape_.chunks_of_gate() - shape_.most_chunks();
  }

  FUSEDREG_DEVICE void load_weight() {
    const int64_t H = shape_.hidden_size, first_unit = cells_.first_unit();
    const Storage* const weight = static_cast<const Storage*>(cells_.loop.layer.weight_hh);
    const int padded = shape_.padded_hidden();
    product_.load([&](int n, int k) {
      const int gate = k / padded, from = k - gate * padded;
      const int64_t to = first_unit + n;
      return from < H && to < H ? weight[(gate * H + from) * H + to] : Storage{};
    });
  }

  // dh of the step before, from everybody's da.
  FUSEDREG_DEVICE void to_hidden(int s) {
    const int chunk_units = shape_.padded_hidden() / shape_.chunks_of_gate();
    const int first = warp_index() % 2 * shape_.most_chunks() * chunk_units;
    const int last = first + chunks() * chunk_units;
    const int last_block = (last + kUnits - 1) / kUnits;
    exchange_.wait(first / kUnits, last_block < shape_.blocks ? last_block : shape_.blocks);
    const ExchangeLayout& layout = params_.exchange;
    float* const partials = params_.shared<float>(params_.room.partials);
    for (int tile = 0; tile < shape_.tiles(); tile += shape_.tiles_of_pass()) {
      const int left = shape_.tiles() - tile, tiles = left < shape_.tiles_of_pass() ? left : shape_.tiles_of_pass();
      const int row = tile * kTileRows, partial_rows = tiles * kTileRows;
      if (tile > 0) sync_block();  // the last pass's sums have been read
      if (shape_.clustered) {
        product_.multiply(SharedSource{exchange_.buffer(), layout.lines, layout.line_bytes, 1}, row, tiles, partials,
                          partial_rows);
      } else {
        product_.multiply(GlobalSource{exchange_.buffer(), layout.lines, layout.line_bytes, 1}, row, tiles, partials,
                          partial_rows);
      }
      wait_for_fetched();  // for the step before: the barrier below hands it to the block
      sync_block();
      cells_.add_recurrent(s, row, row + partial_rows, [&](int tile_row, int column, int warp) {
        return Product::partial(partials, partial_rows, warp, tile_row - row, column);
      });
    }
  }

  const PersistentBackwardParams& params_;
  const BackwardShape& shape_;
  Exchange exchange_;
  Product product_;
  Cells cells_;
};

}  // namespace fusedreg::cuda
