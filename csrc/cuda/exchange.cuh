// How the blocks of a persistent kernel hand one another what each step makes: h forward, da backward, and sums over
// a row for layer norm.
//
// Two ways, chosen at run time by the tier. In a grid, slices go through device memory (in practice the L2) and each
// block has a flag that counts its publications; a reader polls the flags of the blocks whose slices it needs. In a
// cluster, a block stores its slice into the shared memory of all blocks, and the cluster's barrier is the flag.
//
// A buffer has `lines` lines (forward: copies of h x rows; backward: rows), each of one or more parts (backward: the
// gates) that hold all units, zeros beyond the last; of each part a block owns `slice_bytes` from block * slice_bytes
// on. Use, by all threads of all blocks:
//
//   Exchange exchange(layout, ...);
//   exchange.begin();
//   each step:
//     ... write the own slices to `staged`, in shared memory: [line][part][slice_bytes] ...
//     exchange.publish(staged);
//     ... what needs no other block: the next step's masks ...
//     exchange.wait(first_block, last_block);   // warp by warp: each waits for what it reads
//     ... read exchange.buffer(): load_exchanged in a grid, plain loads in a cluster ...
//
// Why two buffers are enough, though nobody waits for readers. Number the publications of one kind n = 0, 1, ...;
// publication n goes to buffer n % 2. Let block P write publication n + 2, over n. Before, all of P's warps have
// returned from wait() for n + 1 (publish() begins with a block barrier), and between them they waited for all blocks:
// so every block Q has published n + 1. Q's publish(n + 1) too begins with a block barrier, which Q's warps reach only
// when they have read all they want of n. So nobody can still be reading n, however slow: a slow reader has not
// published n + 1, and P cannot have passed. What orders the accesses: Q's reads come before Q's release of its flag
// (block barrier, then the release by one thread, which is cumulative over what the barrier ordered before it); P's
// acquire of that flag and P's block barrier come before P's stores. Publications of two kinds (rows and slices) do
// not disturb this: each kind has its own two buffers, and every block publishes the same sequence of kinds.
// The warps of a block must therefore, between them, wait for every block at every publication. In a cluster the
// barrier waits for everybody, and the argument is the same with "arrived" for "published".
#pragma once

#include "device.h"
#include "exchange_layout.h"
#include "storage.h"

namespace fusedreg::cuda {

constexpr uint64_t kLongestWait = 20ull * 1000 * 1000000;  // nanoseconds
constexpr uint32_t kPollsPerTime = 256;

// Indices of threads are opaque() inside: these functions are called once a step, and what they compute is not to be
// kept from step to step in registers that a product could use.
class Exchange {
 public:
  // `memory`: grid_exchange_bytes of zeroed device memory for each group of layout.blocks blocks that share out the
  // units, the first of them blocks 0 ... layout.blocks - 1 of the grid; or, in a cluster, cluster_exchange_bytes of
  // the block's shared memory, at the same offset in every block.
  FUSEDREG_DEVICE Exchange(const ExchangeLayout& layout, bool clustered, void* memory)
      : layout_(layout), clustered_(clustered), own_(clustered ? cluster_rank() : block_index() % layout.blocks) {
    char* at = static_cast<char*>(memory);
    flags_ = nullptr;
    if (!clustered) {
      at += static_cast<size_t>(block_index() / layout.blocks) * grid_exchange_bytes(layout);
      flags_ = reinterpret_cast<uint32_t*>(at);
      at += static_cast<size_t>(layout.blocks) * kFlagWords * sizeof(uint32_t);
    }
    buffers_ = at;
    row_buffers_ = reinterpret_cast<float*>(at + exchange_buffers_bytes(layout));
  }

  // Once, before the first publication.
  FUSEDREG_DEVICE void begin() {
    if (!clustered_) return;  // cleared before the launch
    const int words = static_cast<int>(exchange_buffers_bytes(layout_) / sizeof(Words4));
    for (int i = thread_index(); i < words; i += block_threads()) reinterpret_cast<Words4*>(buffers_)[i] = Words4{};
    // The others store into these buffers: not before they are cleared, nor before this block has begun to run.
    cluster_arrive();
    cluster_wait();
  }

  FUSEDREG_DEVICE bool clustered() const { return clustered_; }
  FUSEDREG_DEVICE int own_block() const { return own_; }

  // What was published last, once waited for: [line][line_bytes].
  FUSEDREG_DEVICE const char* buffer() const { return buffers_ + turn_ * buffer_bytes(); }

  // Hands out this block's slices, [line][part][slice_bytes] in shared memory, 16-byte aligned. `staged` may be written
  // again after the wait.
  FUSEDREG_DEVICE void publish(const void* staged) {
    turn_ ^= 1;
    char* const to = buffers_ + turn_ * buffer_bytes() + own_ * layout_.slice_bytes;
    const int pieces = layout_.slice_bytes / static_cast<int>(sizeof(Words4));
    sync_block();  // `staged` is whole, and every warp is done with the buffer before last
    for (int i = opaque(thread_index()); i < layout_.lines * layout_.parts * pieces; i += block_threads()) {
      const int slice = i / pieces, line = slice / layout_.parts, part = slice - line * layout_.parts;
      const size_t offset = static_cast<size_t>(line) * static_cast<size_t>(layout_.line_bytes) +
                            static_cast<size_t>(part * layout_.part_bytes + (i - slice * pieces) * 16);
      give(reinterpret_cast<Words4*>(to + offset), static_cast<const Words4*>(staged)[i]);
    }
    announce();
  }

  // Waits until blocks first_block ... last_block - 1 have published as often as this one. Each warp calls it once a
  // publication, all lanes together.
  FUSEDREG_DEVICE void wait(int first_block, int last_block) {
    if (clustered_) return cluster_wait();
    for (int block = first_block + opaque(lane()); block < last_block; block += 32) wait_for(block);
    // The lanes' acquires are handed to the whole warp: what a lane has seen published, the others may read.
    sync_warp();
  }

  // The same for the whole block and all blocks. Each flag is polled by one thread.
  FUSEDREG_DEVICE void wait_for_all() {
    if (clustered_) return cluster_wait();
    for (int block = opaque(thread_index()); block < layout_.blocks; block += block_threads()) wait_for(block);
    sync_block();  // as sync_warp above, for the block
  }

  // Hands out two numbers of each row, [row][2] in shared memory, which may be written again after the wait.
  FUSEDREG_DEVICE void publish_rows(const float* staged) {
    row_turn_ ^= 1;
    float* const to = row_buffers_ + row_turn_ * row_buffer_words() + own_ * 2;
    sync_block();  // as in publish
    for (int i = opaque(thread_index()); i < layout_.rows * 2; i += block_threads()) {
      give(to + static_cast<size_t>(i / 2) * layout_.blocks * 2 + i % 2, staged[i]);
    }
    announce();
  }

  // Waits for all blocks' numbers and adds them up: totals[row][2], in shared memory, whole on return. The order of
  // the sum depends on the number of blocks alone.
  FUSEDREG_DEVICE void sum_rows(float* totals) {
    wait_for_all();
    for (int row = opaque(warp_index()); row < layout_.rows; row += block_threads() / 32) {
      float first = 0, second = 0;
      for (int block = lane(); block < layout_.blocks; block += 32) {
        first += row_number(row, block, 0);
        second += row_number(row, block, 1);
      }
      for (int mask = 1; mask < 32; mask *= 2) {
        first += shuffle_xor(first, mask);
        second += shuffle_xor(second, mask);
      }
      if (lane() == 0) {
        totals[row * 2] = first;
        totals[row * 2 + 1] = second;
      }
    }
    sync_block();
  }

  // Where the two numbers are the mean of a block's values of the row and the sum of squares of the distances from it:
  // the mean and the biased variance of all values, by the pairwise formula of Chan, Golub and LeVeque (1983), in an
  // order that depends on the number of blocks alone. Block i has min(slice, all - i * slice) values.
  FUSEDREG_DEVICE void combine_rows(int slice, int all, float* moments) {
    wait_for_all();
    for (int row = opaque(warp_index()); row < layout_.rows; row += block_threads() / 32) {
      Moments own{0, 0, 0};
      for (int block = lane(); block < layout_.blocks; block += 32) {
        const int left = all - block * slice;
        const int count = left < slice ? left : slice;
        own = combined(
            own, {static_cast<float>(count < 0 ? 0 : count), row_number(row, block, 0), row_number(row, block, 1)});
      }
      for (int mask = 1; mask < 32; mask *= 2) {
        const Moments other{shuffle_xor(own.count, mask), shuffle_xor(own.mean, mask), shuffle_xor(own.squares, mask)};
        // The lower lanes' part always comes first, so that both lanes of a pair get the same bits.
        own = (lane() & mask) == 0 ? combined(own, other) : combined(other, own);
      }
      if (lane() == 0) {
        moments[row * 2] = own.mean;
        moments[row * 2 + 1] = own.squares / static_cast<float>(all);
      }
    }
    sync_block();
  }

 private:
  struct Moments {
    float count, mean, squares;
  };

  FUSEDREG_DEVICE static Moments combined(const Moments& a, const Moments& b) {
    const float count = a.count + b.count;
    const float share = count > 0 ? b.count / count : 0.0f;
    const float distance = b.mean - a.mean;
    return {count, a.mean + distance * share, a.squares + b.squares + distance * distance * a.count * share};
  }

  FUSEDREG_DEVICE size_t buffer_bytes() const { return static_cast<size_t>(layout_.lines) * layout_.line_bytes; }
  FUSEDREG_DEVICE size_t row_buffer_words() const { return static_cast<size_t>(layout_.rows) * layout_.blocks * 2; }

  FUSEDREG_DEVICE float row_number(int row, int block, int which) const {
    const float* from =
        row_buffers_ + row_turn_ * row_buffer_words() + (static_cast<size_t>(row) * layout_.blocks + block) * 2 + which;
    return clustered_ ? *from : load_exchanged(from);
  }

  template <class Value>
  FUSEDREG_DEVICE void give(Value* target, Value value) const {
    if (!clustered_) return store_exchanged(target, value);
    // Each block begins with itself, so that not all store to the same one at once.
    for (int i = 0, rank = own_; i < layout_.blocks; ++i) {
      store_to_block(target, rank, value);
      if (++rank == layout_.blocks) rank = 0;
    }
  }

  // What this block has stored becomes visible to those who see the announcement.
  FUSEDREG_DEVICE void announce() {
    ++published_;
    // Cluster: arriving releases each thread's own stores to the other blocks; cluster_wait acquires them.
    if (clustered_) return cluster_arrive();
    // Grid: the barrier orders all threads' stores before thread 0's release at device scope, which is cumulative: who
    // acquires the flag's new value sees them all. The stores themselves go to the L2, where all readers look.
    sync_block();
    if (thread_index() == 0) store_release(flags_ + own_ * kFlagWords, published_);
  }

  FUSEDREG_DEVICE void wait_for(int block) const {
    const uint32_t* const flag = flags_ + block * kFlagWords;
    // The acquire orders the loads of what was published after it. Flags only grow: a faster block is ahead.
    uint32_t seen = load_acquire(flag);
    uint64_t begin = 0;
    for (uint32_t polls = 1; !reached(seen); ++polls) {
      // The timer is asked seldom: what it costs is not known, and a poll that finds the flag late delays every block.
      if (polls % kPollsPerTime == 0) {
        const uint64_t now = timer_nanoseconds();
        if (begin == 0) begin = now;
        if (now - begin > kLongestWait) {
          stop(
              "20 seconds passed at an exchange: blocks are not all resident, or one has stopped. This block, the one "
              "waited for, publications expected and seen:",
              own_, block, published_, seen);
        }
      }
      seen = load_acquire(flag);
    }
  }
  FUSEDREG_DEVICE bool reached(uint32_t value) const { return static_cast<int32_t>(value - published_) >= 0; }

  ExchangeLayout layout_;
  bool clustered_;
  int own_;
  uint32_t* flags_;
  char* buffers_;
  float* row_buffers_;
  int turn_ = 1, row_turn_ = 1;  // the first publication goes to buffer 0
  uint32_t published_ = 0;
};

}  // namespace fusedreg::cuda
