// csrc/stable/team.h against every way in which a runtime may hand out the pieces of a range.
//
// Stands alone, without torch and Python. tests/test_native.py runs it plainly, `make sanitize` under ThreadSanitizer.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../csrc/stable/team.h"

namespace {

using fusedreg::stable::Team;

int passed = 0, failed = 0;

void expect(bool holds, const char* what) {
  (holds ? passed : failed) += 1;
  if (!holds) std::fprintf(stderr, "failed: %s\n", what);
}

// A body whose workers meet: it ends only if as many run at once as `workers` says.
struct Meeting {
  explicit Meeting(int asked) : seen(asked) {}

  static void body(void* context, int worker, int workers) {
    auto& meeting = *static_cast<Meeting*>(context);
    meeting.workers.store(workers);
    meeting.seen[worker].fetch_add(1);
    meeting.arrived.fetch_add(1);
    while (meeting.arrived.load() < workers) std::this_thread::yield();
  }
  // Workers 0 ... workers - 1 ran, each once, and no other.
  bool complete(int expected) const {
    bool right = workers.load() == expected;
    for (int worker = 0; worker < static_cast<int>(seen.size()); ++worker) {
      right = right && seen[worker].load() == (worker < expected ? 1 : 0);
    }
    return right;
  }

  std::atomic<int> workers{0}, arrived{0};
  std::vector<std::atomic<int>> seen;
};

// Pieces of `piece` items of a range of `asked`, each in a thread of its own, but for the first. The pieces from the
// `late`-th on start only after the team has been agreed on, and done its work.
void hand_out(Team& team, int asked, int piece, int late) {
  std::vector<std::thread> others;
  for (int begin = piece; begin < asked && begin / piece < late; begin += piece) {
    others.emplace_back([&team, begin, asked, piece] { team.run_piece(begin, std::min(asked, begin + piece)); });
  }
  team.run_piece(0, std::min(asked, piece));
  for (int begin = late * piece; begin < asked; begin += piece) team.run_piece(begin, std::min(asked, begin + piece));
  for (std::thread& other : others) other.join();
}

void check_pieces(int asked, int piece, int late, int expected, const char* what) {
  Meeting meeting(asked);
  Team team(asked, &Meeting::body, &meeting);
  hand_out(team, asked, piece, late);
  team.rethrow();
  expect(meeting.complete(expected), what);
}

void throwing(void*, int worker, int) {
  if (worker == 1) throw std::runtime_error("worker 1");
}

}  // namespace

int main() {
  constexpr int kNever = 1 << 20;
  for (int turn = 0; turn < 50; ++turn) {
    check_pieces(5, 1, kNever, 5, "a thread for each item");
    check_pieces(5, 2, kNever, 3, "fewer threads than items");
    check_pieces(8, 3, kNever, 3, "a smaller last piece");
    check_pieces(4, 4, kNever, 1, "everything in the calling thread");
  }
  check_pieces(5, 1, 3, 3, "pieces that come too late");
  check_pieces(6, 2, 1, 1, "no piece but the first comes in time");

  for (int asked = 1; asked <= 6; ++asked) {
    Meeting meeting(asked);
    fusedreg::stable::run_team_of_new_threads(asked, &Meeting::body, &meeting);
    expect(meeting.complete(asked), "threads made for the occasion");
  }

  // Two teams at once do not meet each other.
  std::thread other([] { check_pieces(3, 1, kNever, 3, "one of two teams"); });
  Meeting meeting(4);
  fusedreg::stable::run_team_of_new_threads(4, &Meeting::body, &meeting);
  other.join();
  expect(meeting.complete(4), "the other of two teams");

  try {
    fusedreg::stable::run_team_of_new_threads(3, &throwing, nullptr);
    expect(false, "an error of a worker is thrown in the calling thread");
  } catch (const std::runtime_error&) {
    expect(true, "an error of a worker is thrown in the calling thread");
  }

  std::printf("team: %d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
