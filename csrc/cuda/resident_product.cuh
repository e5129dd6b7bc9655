// The one product of both persistent directions: out[row, n] = sum over k of source[row, k] * W[n, k], with a block's
// part of W_hh resident on the chip for the whole sequence.
//
// Forward: source = h, K = hidden units, N = 4 x units of the block, gate-major (n = gate * units + unit).
// Backward: source = da, K = 4 gates x padded units, N = units of the block.
//
// The eight warps of a block split K; each leaves its sums in shared memory (the partials), and whoever needs
// out[row, n] adds the eight of them in a fixed order. A warp holds its slice of W for all N: the first RC chunks in
// registers, the rest in shared memory, as fragments, read by the lane that wrote them, without bank conflicts.
//
// A chunk is 64 bytes of K: 32 values in 16-bit types, 16 in float32. With g = lane / 4 and t = lane % 4, a lane
// fetches from the source 16 bytes of row g ("upper") and of row g + 8 ("lower"), both at byte 16 t of the chunk, and
// holds 16 bytes of W, row n = g, at the same place. The order of k inside a chunk is nobody's business as long as both
// sides agree, so these 16 bytes are used as they lie: words 0 and 1 feed a first matrix instruction, 2 and 3 a second
// one, in the register pattern that m16n8k16 (16 bits) and m16n8k8 (TF32) share. No transposition, no ldmatrix.
//
// True float32 has no matrix instruction. There a lane owns columns instead: W in its registers, the source's values
// broadcast from a small tile in shared memory, 16 rows x 16 values, that the warp writes as it fetches. The bytes that
// W needs, and where they lie, are the same.
//
// Use (all threads of a block of kProductThreads; warp by warp, no block barrier inside):
//
//   ResidentProduct<Mode, NT, RC> product(shared, most_chunks, first_chunk, chunks);   // of this warp
//   product.load(weights);               // weights(n, k) -> Storage, zero outside of W
//   each step, each pass over rows:
//     product.multiply(source, first_row, tiles, partials, partial_rows);   // 16 rows a tile
//     sync_block();
//     ... ResidentProduct<...>::sum(partials, partial_rows, row - first_row, n) ...
//     sync_block();   // before the partials are written again
//
// `source` is GlobalSource or SharedSource, below. Rows beyond its last are zeros, and are never fetched.
#pragma once

#include "device.h"
#include "product_sizes.h"
#include "storage.h"

namespace fusedreg::cuda {

// How a product is computed. `Storage` is what the source and W are made of.
struct BFloat16Product {
  using Storage = BFloat16;
  static constexpr bool kMatrixInstructions = true;
};
struct Float16Product {
  using Storage = Float16;
  static constexpr bool kMatrixInstructions = true;
};
struct Tf32Product {  // whoever publishes the source rounds it, by exchanged() below
  using Storage = float;
  static constexpr bool kMatrixInstructions = true;
};
struct Float32Product {
  using Storage = float;
  static constexpr bool kMatrixInstructions = false;
};

// Values of k in a chunk.
template <class Mode>
constexpr int kChunkValues = kChunkBytes / static_cast<int>(sizeof(typename Mode::Storage));

// A value as the source holds it.
template <class Mode>
FUSEDREG_DEVICE typename Mode::Storage exchanged(float value) {
  if constexpr (Mode::kMatrixInstructions && sizeof(typename Mode::Storage) == 4) {
    return to_tf32(value);
  } else {
    return narrow<typename Mode::Storage>(value);
  }
}

// A source in device memory that other blocks write while this kernel runs: [copy][row][row_bytes]. With gate copies,
// the columns of gate k read copy k (untied masks); otherwise there is one copy.
struct GlobalSource {
  const char* base;
  int rows, row_bytes;
  int copies;

  // The 16 bytes at `offset` from the base.
  FUSEDREG_DEVICE Words4 fetch(int offset) const {
    return load_exchanged(reinterpret_cast<const Words4*>(base + offset));
  }
};

// The same in the block's own shared memory. Where row_bytes is an odd multiple of 64, reads are free of bank
// conflicts.
struct SharedSource {
  const char* base;
  int rows, row_bytes;
  int copies;

  FUSEDREG_DEVICE Words4 fetch(int offset) const { return *reinterpret_cast<const Words4*>(base + offset); }
};

template <class Mode, int NT, int RC>
class ResidentProduct {
 public:
  using Storage = typename Mode::Storage;
  static constexpr int kColumns = NT * 8;
  static constexpr int kPartialStride = ProductSizes::partial_stride(kColumns);

  static constexpr size_t shared_bytes(int most_chunks, int copies) {
    return ProductSizes::fragment_bytes(kColumns, RC, most_chunks) +
           ProductSizes::staging_bytes(Mode::kMatrixInstructions, copies);
  }

  // `shared` is of shared_bytes(most_chunks, copies), 16-byte aligned. This warp has `chunks` chunks of K, of which the
  // first is `first_chunk`; none is fine.
  FUSEDREG_DEVICE ResidentProduct(char* shared, int most_chunks, int first_chunk, int chunks)
      : first_chunk_(first_chunk), chunks_(chunks) {
    const int beyond = most_chunks > RC ? most_chunks - RC : 0;
    fragments_ = reinterpret_cast<Words4*>(shared) + warp_index() * beyond * NT * 32;
    staged_ = shared + ProductSizes::fragment_bytes(kColumns, RC, most_chunks);
  }

  // weights(n, k) gives W[n, k] as Storage, for any n < N and any k of this warp's chunks.
  template <class Weights>
  FUSEDREG_DEVICE void load(const Weights& weights) {
#pragma unroll
    for (int c = 0; c < RC; ++c) {
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        resident_[c][nt] = c < chunks_ ? fragment(weights, c, nt) : Words4{};
        sync_warp();  // so that no more than a fragment's loads wait in registers
      }
    }
    for (int c = RC; c < chunks_; ++c) {
      for (int nt = 0; nt < NT; ++nt) fragment_at(c, nt) = fragment(weights, c, nt);
    }
  }

  // Rows first_row ... first_row + 16 tiles - 1 of the source, to partials[warp][row - first_row][n]. A warp without
  // chunks leaves zeros.
  template <class Source>
  FUSEDREG_DEVICE void multiply(const Source& source, int first_row, int tiles, float* partials, int partial_rows) {
    float* own = partials + warp_index() * partial_rows * kPartialStride;
    Fetched ahead[RC];
    if constexpr (Mode::kMatrixInstructions && NT % 4 == 0) {
      if (source.copies > 1) return multiply_gates(source, first_row, tiles, own, ahead);
    }
    fetch_ahead(ahead, source, first_row, 0);
    for (int tile = 0; tile < tiles; ++tile) {
      const int row = first_row + tile * kTileRows;
      Sums sums = {};
#pragma unroll
      for (int c = 0; c < RC; ++c) {
        if (c >= chunks_) continue;
        accumulate(sums, source, row, c, ahead[c], [&](int nt) { return resident_[c][nt]; });
        // The next tile's values are on their way while this one's other chunks are multiplied.
        if (tile + 1 < tiles) ahead[c] = fetch(source, row + kTileRows, c, 0);
      }
      for (int c = RC; c < chunks_; ++c) {
        const Fetched fetched = fetch(source, row, c, 0);
        accumulate(sums, source, row, c, fetched, [&](int nt) { return fragment_at(c, nt); });
      }
      leave(sums, own + tile * kTileRows * kPartialStride);
    }
  }

  // out[row, n] of the pass. `warps`: where only the first ones have chunks, how many.
  FUSEDREG_DEVICE static float sum(const float* partials, int partial_rows, int row, int n, int warps = kProductWarps) {
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < kProductWarps; ++warp) {
      if (warp < warps) total += partial(partials, partial_rows, warp, row, n);
    }
    return total;
  }
  // One warp's share of it, where the warps' shares have masks of their own.
  FUSEDREG_DEVICE static float partial(const float* partials, int partial_rows, int warp, int row, int n) {
    return partials[static_cast<size_t>(warp * partial_rows + row) * kPartialStride + n];
  }

 private:
  // Sums of a tile in a lane. Matrix instructions: [n-tile][4], rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t,
  // 2t + 1. float32: [row][column of the lane].
  static constexpr int kSplit = NT < 4 ? 4 / NT : 1;  // float32: lanes that share a column, each with a part of k
  static constexpr int kLaneColumns = NT < 4 ? 1 : NT / 4;
  static_assert(Mode::kMatrixInstructions || NT == 1 || NT == 2 || NT % 4 == 0, "columns of a lane are whole");
  struct MatrixSums {
    float value[NT][4];
  };
  struct LaneSums {
    float value[kTileRows][kLaneColumns];
  };
  using Sums = std::conditional_t<Mode::kMatrixInstructions, MatrixSums, LaneSums>;
  struct Fetched {
    Words4 upper, lower;
  };

  FUSEDREG_DEVICE Words4& fragment_at(int c, int nt) const { return fragments_[((c - RC) * NT + nt) * 32 + lane()]; }

  // The 16 bytes of W that this lane holds for n-tile nt of its warp's chunk c.
  template <class Weights>
  FUSEDREG_DEVICE Words4 fragment(const Weights& weights, int c, int nt) const {
    const int k = (first_chunk_ + c) * kChunkValues<Mode>;
    Words4 words;
    if constexpr (!Mode::kMatrixInstructions) {
#pragma unroll
      for (int j = 0; j < 4; ++j) words.word[j] = bits_of(weights(lane_column(nt), k + lane_value(nt) + j));
    } else if constexpr (sizeof(Storage) == 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words.word[j] = bits_of(to_tf32(weights(nt * 8 + lane() / 4, k + lane() % 4 * 4 + j)));
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int n = nt * 8 + lane() / 4, at = k + lane() % 4 * 8 + 2 * j;
        words.word[j] = static_cast<uint32_t>(weights(n, at).bits) | static_cast<uint32_t>(weights(n, at + 1).bits)
                                                                         << 16;
      }
    }
    return words;
  }
  // float32: the column, and the first of four values of the chunk, that n-tile nt's words stand for in this lane.
  FUSEDREG_DEVICE static int lane_column(int nt) { return NT < 4 ? lane() % kColumns : nt / 4 * 32 + lane(); }
  FUSEDREG_DEVICE static int lane_value(int nt) { return (NT < 4 ? lane() / kColumns * NT + nt : nt % 4) * 4; }

  // `row` is the tile's first. Offsets fit 32 bits, and are cheap: nothing of them is to be kept from step to step in
  // registers that W could use.
  template <class Source>
  FUSEDREG_DEVICE Fetched fetch(const Source& source, int row, int c, int copy) const {
    const int upper = row + opaque(lane()) / 4, lower = upper + 8;
    const int offset =
        (copy * source.rows + upper) * source.row_bytes + (first_chunk_ + c) * kChunkBytes + lane() % 4 * 16;
    return {upper < source.rows ? source.fetch(offset) : Words4{},
            lower < source.rows ? source.fetch(offset + 8 * source.row_bytes) : Words4{}};
  }
  template <class Source>
  FUSEDREG_DEVICE void fetch_ahead(Fetched (&ahead)[RC], const Source& source, int row, int copy) const {
#pragma unroll
    for (int c = 0; c < RC; ++c) {
      if (c < chunks_) ahead[c] = fetch(source, row, c, copy);
    }
  }

  // Gate by gate, each from its own copy of the source: matrix instructions with untied masks.
  template <class Source>
  FUSEDREG_DEVICE void multiply_gates(const Source& source, int first_row, int tiles, float* own,
                                      Fetched (&ahead)[RC]) {
    fetch_ahead(ahead, source, first_row, 0);
    for (int tile = 0; tile < tiles; ++tile) {
      const int row = first_row + tile * kTileRows;
      Sums sums = {};
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        const bool last = gate == 3;
#pragma unroll
        for (int c = 0; c < RC; ++c) {
          if (c >= chunks_) continue;
          accumulate_tiles(sums, gate * (NT / 4), NT / 4, ahead[c], [&](int nt) { return resident_[c][nt]; });
          if (!last) {
            ahead[c] = fetch(source, row, c, gate + 1);
          } else if (tile + 1 < tiles) {
            ahead[c] = fetch(source, row + kTileRows, c, 0);
          }
        }
        for (int c = RC; c < chunks_; ++c) {
          const Fetched fetched = fetch(source, row, c, gate);
          accumulate_tiles(sums, gate * (NT / 4), NT / 4, fetched, [&](int nt) { return fragment_at(c, nt); });
        }
      }
      leave(sums, own + tile * kTileRows * kPartialStride);
    }
  }

  template <class Source, class Resident>
  FUSEDREG_DEVICE void accumulate(Sums& sums, const Source& source, int row, int c, const Fetched& fetched,
                                  const Resident& resident) const {
    if constexpr (Mode::kMatrixInstructions) {
      accumulate_tiles(sums, 0, NT, fetched, resident);
    } else {
      accumulate_lanes(sums, source, row, c, fetched, resident);
    }
  }

  template <class Resident>
  FUSEDREG_DEVICE static void accumulate_tiles(Sums& sums, int first, int count, const Fetched& fetched,
                                               const Resident& resident) {
    const uint32_t* upper = fetched.upper.word;
    const uint32_t* lower = fetched.lower.word;
    const uint32_t a[2][4] = {{upper[0], lower[0], upper[1], lower[1]}, {upper[2], lower[2], upper[3], lower[3]}};
#pragma unroll
    for (int i = 0; i < NT; ++i) {
      if (i >= count) break;
      const Words4 w = resident(first + i);
      const uint32_t b[2][2] = {{w.word[0], w.word[1]}, {w.word[2], w.word[3]}};
      mma<Storage>(sums.value[first + i], a[0], b[0]);
      mma<Storage>(sums.value[first + i], a[1], b[1]);
    }
  }

  // float32. With untied masks the other gates' copies are fetched here: their values are not on their way.
  template <class Source, class Resident>
  FUSEDREG_DEVICE void accumulate_lanes(Sums& sums, const Source& source, int row, int c, const Fetched& fetched,
                                        const Resident& resident) const {
    char* const staged = staged_ + static_cast<size_t>(warp_index() * source.copies) * ProductSizes::kStagedCopy;
    const auto stage = [&](const Fetched& values, int copy) {
      char* const to = staged + copy * ProductSizes::kStagedCopy + lane() / 4 * kChunkBytes + lane() % 4 * 16;
      *reinterpret_cast<Words4*>(to) = values.upper;
      *reinterpret_cast<Words4*>(to + 8 * kChunkBytes) = values.lower;
    };
    sync_warp();  // the last chunk's values have been read
    stage(fetched, 0);
    for (int copy = 1; copy < source.copies; ++copy) stage(fetch(source, row, c, copy), copy);
    sync_warp();
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const Words4 w = resident(nt);
      const int copy = source.copies > 1 ? lane_column(nt) * 4 / kColumns : 0;
      const char* const from = staged + copy * ProductSizes::kStagedCopy + lane_value(nt) * 4;
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        const Words4 value = *reinterpret_cast<const Words4*>(from + r * kChunkBytes);
        float& total = sums.value[r][NT < 4 ? 0 : nt / 4];
#pragma unroll
        for (int j = 0; j < 4; ++j) total += float_of(value.word[j]) * float_of(w.word[j]);
      }
    }
  }

  FUSEDREG_DEVICE static void leave(Sums& sums, float* tile) {
    if constexpr (Mode::kMatrixInstructions) {
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        float* const at = tile + lane() / 4 * kPartialStride + nt * 8 + lane() % 4 * 2;
        at[0] = sums.value[nt][0];
        at[1] = sums.value[nt][1];
        at[8 * kPartialStride] = sums.value[nt][2];
        at[8 * kPartialStride + 1] = sums.value[nt][3];
      }
    } else {
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
        for (int column = 0; column < kLaneColumns; ++column) {
          float total = sums.value[r][column];
#pragma unroll
          for (int mask = 32 / kSplit; mask < 32; mask *= 2) total += shuffle_xor(total, mask);
          // Lanes that share a column have the same total; each writes its part of the rows.
          if (kSplit == 1 || r % kSplit == lane() / kColumns) {
            tile[r * kPartialStride + (NT < 4 ? lane() % kColumns : column * 32 + lane())] = total;
          }
        }
      }
    }
  }

  Words4 resident_[RC][NT];
  Words4* fragments_;
  char* staged_;
  int first_chunk_, chunks_;
};

}  // namespace fusedreg::cuda
