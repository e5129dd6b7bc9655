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

// kAhead: chunks of the source that are on their way at a time; each takes 8 registers a thread.
template <class Mode, int NT, int RC, int kAhead = RC>
class ResidentProduct {
  static_assert(RC % kAhead == 0, "chunks are fetched group by group, and a group has its W in one place");

 public:
  using Storage = typename Mode::Storage;
  static constexpr int kColumns = NT * 8;

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

  // weights(n, k) gives W[n, k] as Storage, for any n < N and any k of this warp's chunks. A loop, which picks its
  // registers by selection: unrolled, this would be most of the kernel's code, and runs once. Some fragments at a time,
  // since each waits for device memory.
  template <class Weights>
  FUSEDREG_DEVICE void load(const Weights& weights) {
    constexpr int kAtATime = 4;
#pragma unroll
    for (int i = 0; i < RC * NT; ++i) resident_[i / NT][i % NT] = Words4{};
#pragma unroll 1
    for (int at = 0; at < chunks_ * NT; at += kAtATime) {
      Words4 words[kAtATime];
#pragma unroll
      for (int j = 0; j < kAtATime; ++j) {
        if (at + j < chunks_ * NT) words[j] = fragment(weights, (at + j) / NT, (at + j) % NT);
      }
#pragma unroll
      for (int j = 0; j < kAtATime; ++j) {
        if (at + j >= RC * NT && at + j < chunks_ * NT) fragment_at((at + j) / NT, (at + j) % NT) = words[j];
      }
#pragma unroll
      for (int i = 0; i < RC * NT; ++i) {
        if (i / kAtATime * kAtATime == at && i < chunks_ * NT) resident_[i / NT][i % NT] = words[i % kAtATime];
      }
    }
  }

  // Rows first_row ... first_row + 16 tiles - 1 of the source, to partials[warp][row - first_row][n], in places that
  // partial() knows. A warp without chunks leaves zeros.
  template <class Source>
  FUSEDREG_DEVICE void multiply(const Source& source, int first_row, int tiles, float* partials, int partial_rows) {
    float* own = partials + warp_index() * partial_rows * kColumns;
    if constexpr (Mode::kMatrixInstructions && NT % 4 == 0) {
      // Gate by gate, each from its own copy.
      if (source.copies > 1) return multiply_parts<4>(source, first_row, tiles, own);
    }
    multiply_parts<kParts>(source, first_row, tiles, own);
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
    const int place = row * kColumns + (n ^ ProductSizes::partial_swizzle(kColumns, row));
    return partials[warp * partial_rows * kColumns + place];
  }

 private:
  static constexpr int kSplit = NT < 4 ? 4 / NT : 1;  // float32: lanes that share a column, each with a part of k
  static constexpr int kLaneColumns = NT < 4 ? 1 : NT / 4;
  static_assert(Mode::kMatrixInstructions || NT == 1 || NT == 2 || NT % 4 == 0, "columns of a lane are whole");
  // So many columns that their sums would crowd W out of the registers are summed in parts, each of which reads the
  // source again.
  static constexpr int kParts = Mode::kMatrixInstructions && NT > 8 ? NT / 8 : 1;
  // Sums of a tile in a lane. Matrix instructions: [n-tile][4], rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t,
  // 2t + 1. float32: [row][column of the lane].
  template <int kTiles>
  struct MatrixSums {
    float value[kTiles][4];
  };
  struct LaneSums {
    float value[kTileRows][kLaneColumns];
  };
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
  FUSEDREG_DEVICE void fetch_ahead(Fetched (&ahead)[kAhead], const Source& source, int row, int copy) const {
#pragma unroll
    for (int c = 0; c < kAhead; ++c) {
      if (c < chunks_) ahead[c] = fetch(source, row, c, copy);
    }
  }

  // The columns in equal parts, one after another. Parts are template arguments, not a loop to be unrolled: if it were
  // not, W could not be in registers.
  template <int kOfParts, class Source>
  FUSEDREG_DEVICE void multiply_parts(const Source& source, int first_row, int tiles, float* own) {
    Fetched ahead[kAhead];
    fetch_ahead(ahead, source, first_row, 0);
    for (int tile = 0; tile < tiles; ++tile) {
      multiply_tile<0, kOfParts>(source, first_row + tile * kTileRows, tile + 1 == tiles,
                                 own + tile * kTileRows * kColumns, ahead);
    }
  }
  template <int kPart, int kOfParts, class Source>
  FUSEDREG_DEVICE void multiply_tile(const Source& source, int row, bool last_tile, float* own,
                                     Fetched (&ahead)[kAhead]) {
    constexpr int kTiles = NT / kOfParts;
    constexpr bool kLastPart = kPart + 1 == kOfParts;
    using Sums = std::conditional_t<Mode::kMatrixInstructions, MatrixSums<kTiles>, LaneSums>;
    const bool last = kLastPart && last_tile;
    const int next_row = kLastPart ? row + kTileRows : row;
    const int copy = source.copies > 1 ? kPart : 0, next_copy = source.copies > 1 && !kLastPart ? kPart + 1 : 0;
    // What takes the place of chunk c, number j of its group: the same of the next group, or of what comes next.
    const auto fetch_next = [&](int c, int j) {
      if (c - j + kAhead < chunks_) {
        if (c + kAhead < chunks_) ahead[j] = fetch(source, row, c + kAhead, copy);
      } else if (!last && j < chunks_) {
        ahead[j] = fetch(source, next_row, j, next_copy);
      }
    };
    Sums sums = {};
#pragma unroll
    for (int c = 0; c < RC; ++c) {
      if (c - c % kAhead >= chunks_) continue;
      if (c < chunks_) {
        accumulate(sums, source, row, c, ahead[c % kAhead], [&](int i) { return resident_[c][kPart * kTiles + i]; });
      }
      fetch_next(c, c % kAhead);
    }
#pragma unroll 1
    for (int first = RC; first < chunks_; first += kAhead) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int c = first + j;
        if (c < chunks_) {
          accumulate(sums, source, row, c, ahead[j], [&](int i) { return fragment_at(c, kPart * kTiles + i); });
        }
        fetch_next(c, j);
      }
    }
    leave(sums, kPart * kTiles, own);
    if constexpr (!kLastPart) multiply_tile<kPart + 1, kOfParts>(source, row, last_tile, own, ahead);
  }

  // resident(i) is W of this part's n-tile i.
  template <int kTiles, class Source, class Resident>
  FUSEDREG_DEVICE void accumulate(MatrixSums<kTiles>& sums, const Source&, int, int, const Fetched& fetched,
                                  const Resident& resident) const {
    const uint32_t* upper = fetched.upper.word;
    const uint32_t* lower = fetched.lower.word;
    const uint32_t a[2][4] = {{upper[0], lower[0], upper[1], lower[1]}, {upper[2], lower[2], upper[3], lower[3]}};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const Words4 w = resident(i);
      const uint32_t b[2][2] = {{w.word[0], w.word[1]}, {w.word[2], w.word[3]}};
      mma<Storage>(sums.value[i], a[0], b[0]);
      mma<Storage>(sums.value[i], a[1], b[1]);
    }
  }

  // float32. With untied masks the other gates' copies are fetched here: their values are not on their way.
  template <class Source, class Resident>
  FUSEDREG_DEVICE void accumulate(LaneSums& sums, const Source& source, int row, int c, const Fetched& fetched,
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
    // Values that all columns of a lane share are read once for them; not so where gates have copies of their own.
    constexpr int kQuarters = NT / kLaneColumns;
#pragma unroll
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      const char* const from = staged + lane_value(quarter) * 4;
      if (source.copies == 1) {
        Words4 w[kLaneColumns];
#pragma unroll
        for (int column = 0; column < kLaneColumns; ++column) w[column] = resident(column * kQuarters + quarter);
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) {
          const Words4 value = *reinterpret_cast<const Words4*>(from + r * kChunkBytes);
#pragma unroll
          for (int column = 0; column < kLaneColumns; ++column) add_product(sums.value[r][column], value, w[column]);
        }
        continue;
      }
#pragma unroll
      for (int column = 0; column < kLaneColumns; ++column) {
        const int nt = column * kQuarters + quarter, copy = lane_column(nt) * 4 / kColumns;
        const Words4 w = resident(nt);
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) {
          const int offset = copy * ProductSizes::kStagedCopy + r * kChunkBytes;
          add_product(sums.value[r][column], *reinterpret_cast<const Words4*>(from + offset), w);
        }
      }
    }
  }
  FUSEDREG_DEVICE static void add_product(float& total, const Words4& a, const Words4& b) {
#pragma unroll
    for (int j = 0; j < 4; ++j) total += float_of(a.word[j]) * float_of(b.word[j]);
  }

  // Two sums next to each other, left by one instruction.
  struct alignas(8) Pair {
    float first, second;
  };
  // From n-tile `first` of the tile's partials on.
  template <int kTiles>
  FUSEDREG_DEVICE static void leave(const MatrixSums<kTiles>& sums, int first, float* tile) {
    const int row = lane() / 4, swizzle = ProductSizes::partial_swizzle(kColumns, row);
    float* const own = tile + row * kColumns + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      float* const to = own + ((first + i) * 8 ^ swizzle);
      *reinterpret_cast<Pair*>(to) = {sums.value[i][0], sums.value[i][1]};
      *reinterpret_cast<Pair*>(to + 8 * kColumns) = {sums.value[i][2], sums.value[i][3]};
    }
  }
  FUSEDREG_DEVICE static void leave(const LaneSums& sums, int, float* tile) {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
      for (int column = 0; column < kLaneColumns; ++column) {
        float total = sums.value[r][column];
#pragma unroll
        for (int mask = 32 / kSplit; mask < 32; mask *= 2) total += shuffle_xor(total, mask);
        // Lanes that share a column have the same total; each writes its part of the rows.
        if (kSplit == 1 || r % kSplit == lane() / kColumns) {
          const int n = NT < 4 ? lane() % kColumns : column * 32 + lane();
          tile[r * kColumns + (n ^ ProductSizes::partial_swizzle(kColumns, r))] = total;
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
