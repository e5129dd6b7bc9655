// Threads for the CPU kernels: a team of workers that are sure to run at the same time. Knows nothing of torch.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "../cpu/lstm_layer.h"

namespace fusedreg::stable {

// torch's parallel_for splits a range; it does not promise one thread per item, nor even that the pieces run at the
// same time. It may run everything in the calling thread (nested regions, thread limits), hand out fewer and larger
// pieces than asked, or queue pieces behind another Python thread's. A kernel whose workers meet at barriers needs
// workers that are there, so the team is agreed on first: the worker with the first piece, which runs in the
// calling thread, waits for the others to arrive. Whoever arrives after it has stopped waiting goes home.
//
// Where all arrive (always, but for queued pieces) a worker's number is its piece's, so that a thread keeps its part
// of the work, and of the cache, from one call to the next.
//
// A body that throws between two barriers would leave the others waiting; the kernels allocate before they ask for a
// team. What a body does throw is thrown again in the calling thread.
class Team {
 public:
  Team(int asked, cpu::TeamBody body, void* context) : asked_(asked), body_(body), context_(context) {}

  // The callback of parallel_for(0, asked): one call per piece.
  void run_piece(int64_t begin, int64_t end) noexcept {
    try {
      if (begin == 0) {
        const int64_t piece = end - begin;
        run(0, gather(static_cast<int>((asked_ + piece - 1) / piece), static_cast<int>(piece)));
      } else if (const int arrival = arrive(); arrival > 0) {
        const int workers = wait([this] { return workers_.load(std::memory_order_acquire); });
        const bool complete = complete_.load(std::memory_order_relaxed);
        run(complete ? static_cast<int>(begin / piece_.load(std::memory_order_relaxed)) : arrival, workers);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static constexpr int kClosed = 1 << 30;

  void run(int worker, int workers) { body_(context_, worker, workers); }

  // Returns the condition's first value that is not 0. Spins, then lets others have the processor: with more threads
  // than processors, the awaited one may need it.
  template <typename Condition>
  static int wait(const Condition& condition) {
    for (int spin = 0;; ++spin) {
      if (const int value = condition()) return value;
      if (spin > kSpins) std::this_thread::yield();
    }
  }

  // The caller's number by order of arrival, from 1; 0 when the team is complete without it.
  int arrive() {
    int seen = arrived_.load(std::memory_order_relaxed);
    do {
      if (seen & kClosed) return 0;
    } while (!arrived_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel));
    return seen + 1;
  }

  // Waits for `expected` workers, the caller among them, and closes the team with those who came.
  int gather(int expected, int piece) {
    if (expected > 1) {
      const auto deadline = std::chrono::steady_clock::now() + kPatience;
      wait([&] {
        return arrived_.load(std::memory_order_acquire) == expected - 1 || std::chrono::steady_clock::now() > deadline;
      });
    }
    const int workers = 1 + arrived_.fetch_or(kClosed, std::memory_order_acq_rel);
    piece_.store(piece, std::memory_order_relaxed);
    complete_.store(workers == expected, std::memory_order_relaxed);
    workers_.store(workers, std::memory_order_release);
    return workers;
  }

  static constexpr int kSpins = 1000;
  // Long beside the wake-up of a thread, even on a busy machine; short beside a user's.
  static constexpr std::chrono::milliseconds kPatience{20};

  const int asked_;
  const cpu::TeamBody body_;
  void* const context_;
  std::atomic<int> arrived_{0};  // workers other than the first, and kClosed
  std::atomic<int> workers_{0};  // 0 until agreed
  std::atomic<int> piece_{1};
  std::atomic<bool> complete_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

// cpu::RunTeam with threads made for the occasion: some 50 microseconds a call dearer than a pool.
inline void run_team_of_new_threads(int asked, cpu::TeamBody body, void* context) {
  Team team(asked, body, context);
  std::vector<std::thread> others;
  others.reserve(asked);
  try {
    for (int worker = 1; worker < asked; ++worker) {
      others.emplace_back([&team, worker] { team.run_piece(worker, worker + 1); });
    }
  } catch (const std::system_error&) {
    // The system gives no more threads: the team is those that there are.
  }
  team.run_piece(0, 1);
  for (std::thread& other : others) other.join();
  team.rethrow();
}

}  // namespace fusedreg::stable
