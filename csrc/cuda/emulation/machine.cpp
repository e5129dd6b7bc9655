#include "machine.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "fiber.h"

namespace fusedreg::cuda::emulation {
namespace {

constexpr size_t kMargin = 4096;            // around a block's shared memory, to find what is written beside it
constexpr unsigned char kPoison = 0xFF;     // NaN in every floating-point type
constexpr uint64_t kJump = 1'000'000'000;   // nanoseconds by which time advances where all threads only poll
constexpr int kJumpsBeforeDeadlock = 1000;  // far beyond any bounded wait

struct Machine {
  Launch launch;
  void (*kernel)(const void*) = nullptr;
  const void* params = nullptr;

  std::vector<std::unique_ptr<Block>> blocks;  // alive together
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Block*> active;   // with threads that can go on
  std::vector<Thread*> parked;  // pollers that have seen the same value twice
  Block* turn = nullptr;        // whose threads run at present, and for how many resumes yet
  uint32_t burst = 0;
  Block* slow_block = nullptr;
  int live = 0;
  int jumps = 0;
  uint64_t nanoseconds = 0;
  std::string failure;

  Random random;
  Visibility visibility;
  Stacks stacks;
  void* scheduler = nullptr;  // the host's own stack, while a thread runs
  Thread* running = nullptr;
};

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

void wake(Thread* thread) {
  Machine& m = machine();
  thread->place = Place{};
  Block& block = *thread->block;
  block.ready.push_back(thread);
  if (!block.listed) {
    block.listed = true;
    m.active.push_back(&block);
  }
}

void wake_all(std::vector<Thread*>& threads) {
  for (Thread* thread : threads) wake(thread);
  threads.clear();
}

void switch_to_scheduler() {
  Machine& m = machine();
  fusedreg_emulation_switch(&m.running->stack_pointer, m.scheduler);
}

void yield() {
  wake(machine().running);
  switch_to_scheduler();
}

void run_thread() {
  Machine& m = machine();
  try {
    m.kernel(m.params);
  } catch (const std::exception& error) {
    if (m.failure.empty()) m.failure = error.what();
  }
  m.running->returned = true;
  m.running->block->live -= 1;
  m.live -= 1;
  m.jumps = 0;
  switch_to_scheduler();
}

Thread* choose() {
  Machine& m = machine();
  while (m.burst == 0 || m.turn == nullptr || m.turn->ready.empty()) {
    if (m.turn != nullptr && m.turn->ready.empty()) {
      m.turn->listed = false;
      m.active.erase(std::find(m.active.begin(), m.active.end(), m.turn));
      m.turn = nullptr;
    }
    if (m.active.empty()) return nullptr;
    m.turn = m.active[m.random.below(static_cast<uint32_t>(m.active.size()))];
    // One block may be far slower than the others: what is overwritten too early is overwritten under its eyes.
    if (m.turn == m.slow_block && m.active.size() > 1 && m.random.below(16) != 0) {
      m.turn = nullptr;
      continue;
    }
    m.burst = 1 + m.random.below(64);
  }
  m.burst -= 1;
  std::vector<Thread*>& ready = m.turn->ready;
  uint32_t index = m.random.below(static_cast<uint32_t>(ready.size()));
  for (int again = 0; again < 4 && ready[index]->index / kLanes == m.turn->slow_warp; ++again) {
    index = m.random.below(static_cast<uint32_t>(ready.size()));
  }
  Thread* const chosen = ready[index];
  ready[index] = ready.back();
  ready.pop_back();
  return chosen;
}

// Nothing can go on by itself: time passes for those that poll, and where nobody does, nothing ever will.
void pass_time() {
  Machine& m = machine();
  m.visibility.settle();
  if (m.parked.empty() || ++m.jumps > kJumpsBeforeDeadlock) {
    m.failure = describe_deadlock(m.blocks);
    return;
  }
  m.nanoseconds += kJump;
  wake_all(m.parked);
}

void check_margins() {
  Machine& m = machine();
  for (const auto& block : m.blocks) {
    const unsigned char* const before = reinterpret_cast<unsigned char*>(block->shared) - kMargin;
    const unsigned char* const after = reinterpret_cast<unsigned char*>(block->shared) + m.launch.shared_bytes;
    const auto foreign = [](unsigned char byte) { return byte != kPoison; };
    if (std::any_of(before, before + kMargin, foreign) || std::any_of(after, after + kMargin, foreign)) {
      m.failure = "block " + std::to_string(block->x) + " wrote outside its " + std::to_string(m.launch.shared_bytes) +
                  " bytes of shared memory";
    }
  }
}

void start_blocks(const std::vector<std::pair<int, int>>& places) {
  Machine& m = machine();
  const size_t cluster = static_cast<size_t>(std::max(1, m.launch.cluster));
  m.blocks.clear();
  m.clusters.clear();
  m.active.clear();
  m.parked.clear();
  m.turn = nullptr;
  m.burst = 0;
  m.jumps = 0;
  m.visibility.begin();
  m.live = static_cast<int>(places.size()) * m.launch.threads;
  m.stacks.reserve(static_cast<size_t>(m.live));
  size_t stack = 0;
  for (const auto& [x, y] : places) {
    auto block = std::make_unique<Block>();
    if (m.blocks.size() % cluster == 0) m.clusters.push_back(std::make_unique<Cluster>());
    block->x = x;
    block->y = y;
    block->live = m.launch.threads;
    block->cluster = m.clusters.back().get();
    block->rank = static_cast<int>(block->cluster->blocks.size());
    block->cluster->blocks.push_back(block.get());
    block->memory.reset(new unsigned char[m.launch.shared_bytes + 2 * kMargin + 16]);
    std::memset(block->memory.get(), kPoison, m.launch.shared_bytes + 2 * kMargin + 16);
    const uintptr_t start = (reinterpret_cast<uintptr_t>(block->memory.get()) + kMargin + 15) & ~uintptr_t{15};
    block->shared = reinterpret_cast<char*>(start);
    block->threads.resize(m.launch.threads);
    block->warps.resize(m.launch.threads / kLanes);
    if (m.random.below(2) != 0) block->slow_warp = static_cast<int>(m.random.below(m.launch.threads / kLanes));
    for (int index = 0; index < m.launch.threads; ++index) {
      Thread& thread = block->threads[index];
      thread.index = index;
      thread.block = block.get();
      thread.warp = &block->warps[index / kLanes];
      thread.stack_pointer = m.stacks.prepare(stack++, run_thread);
      wake(&thread);
    }
    m.blocks.push_back(std::move(block));
  }
  m.slow_block =
      m.random.below(2) != 0 ? m.blocks[m.random.below(static_cast<uint32_t>(m.blocks.size()))].get() : nullptr;
}

void run_until_all_return() {
  Machine& m = machine();
  while (m.live > 0 && m.failure.empty()) {
    Thread* const next = choose();
    if (next == nullptr) {
      pass_time();
      continue;
    }
    m.nanoseconds += 10;
    m.visibility.drift();
    m.running = next;
    fusedreg_emulation_switch(&m.scheduler, next->stack_pointer);
    m.running = nullptr;
  }
  m.visibility.settle();
  if (m.failure.empty()) check_margins();
}

}  // namespace

Thread& running() { return *machine().running; }
const Launch& launched() { return machine().launch; }
Visibility& visibility() { return machine().visibility; }
uint64_t virtual_nanoseconds() { return machine().nanoseconds; }

[[noreturn]] void fail(const std::string& message) {
  throw std::runtime_error(message + " (block " + std::to_string(running().block->x) + ", thread " +
                           std::to_string(running().index) + ")");
}

void give_way() {
  if (machine().random.below(2) != 0) yield();
}

void meet_block(const Place& place) {
  Machine& m = machine();
  Block& block = *m.running->block;
  m.running->place = place;
  block.waiting.push_back(m.running);
  if (block.waiting.size() == block.threads.size()) {
    m.jumps = 0;
    m.visibility.block_barrier(block);
    wake_all(block.waiting);
  }
  switch_to_scheduler();
}

const unsigned char* meet_warp(const Place& place, const void* value, size_t bytes) {
  Machine& m = machine();
  Thread& thread = *m.running;
  Warp& warp = *thread.warp;
  if (!warp.waiting.empty() && std::strcmp(warp.place.operation, place.operation) != 0) {
    fail(std::string("lanes of a warp meet at different operations: ") + warp.place.operation + " at line " +
         std::to_string(warp.place.line) + ", " + place.operation + " at line " + std::to_string(place.line));
  }
  warp.place = place;
  auto& slots = warp.slot[thread.exchanges++ % 2];
  if (bytes != 0) std::memcpy(slots[thread.index % kLanes], value, bytes);
  thread.place = place;
  warp.waiting.push_back(&thread);
  if (warp.waiting.size() == kLanes) {
    // Only sync_warp, which hands over no value, promises anything of memory.
    if (bytes == 0) m.visibility.warp_barrier(warp, &thread.block->threads[thread.index / kLanes * kLanes], kLanes);
    wake_all(warp.waiting);
  }
  switch_to_scheduler();
  return slots[0];
}

void arrive_at_cluster(bool release, const Place& place) {
  Machine& m = machine();
  Thread& thread = *m.running;
  Cluster& cluster = *thread.block->cluster;
  if (thread.arrived) fail("arrives at the cluster's barrier twice, line " + std::to_string(place.line));
  thread.arrived = true;
  thread.arrival_phase = cluster.phase;
  if (release) m.visibility.cluster_arrival(thread);
  if (++cluster.arrived == static_cast<int>(cluster.blocks.size()) * m.launch.threads) {
    cluster.arrived = 0;
    cluster.phase += 1;
    m.jumps = 0;
    m.visibility.cluster_barrier(cluster);
    wake_all(cluster.waiting);
  }
  give_way();
}

void wait_for_cluster(bool wait, const Place& place) {
  Machine& m = machine();
  Thread& thread = *m.running;
  Cluster& cluster = *thread.block->cluster;
  if (!thread.arrived) fail("waits for a cluster it has not arrived at, line " + std::to_string(place.line));
  if (wait && cluster.phase == thread.arrival_phase) {
    thread.place = place;
    cluster.waiting.push_back(&thread);
    switch_to_scheduler();
  } else {
    yield();
  }
  thread.arrived = false;
}

uint32_t poll(const uint32_t* flag, bool acquire, const Place& place) {
  Machine& m = machine();
  Thread& thread = *m.running;
  if (thread.polled == flag && thread.polled_value == *flag) {
    thread.place = place;
    m.parked.push_back(&thread);
    switch_to_scheduler();
  } else {
    yield();
  }
  thread.polled = flag;
  thread.polled_value = m.visibility.load_flag(thread, flag, acquire);
  return thread.polled_value;
}

void publish(uint32_t* flag, uint32_t value, bool release) {
  Machine& m = machine();
  if (release) m.visibility.fence(*m.running);
  m.visibility.store_flag(*m.running, flag, value);
  m.jumps = 0;
  wake_all(m.parked);
  give_way();
}

void fence() {
  machine().visibility.fence(running());
  give_way();
}

char* shared_of(const char* address, int rank, size_t bytes) {
  Machine& m = machine();
  const Block& own = *m.running->block;
  const Cluster& cluster = *own.cluster;
  if (rank < 0 || rank >= static_cast<int>(cluster.blocks.size())) {
    fail("reaches for block " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster.blocks.size()));
  }
  const std::ptrdiff_t offset = address - own.shared;
  if (offset < 0 || static_cast<size_t>(offset) + bytes > m.launch.shared_bytes) {
    fail("reaches outside the shared memory of a block of its cluster");
  }
  const Block& other = *cluster.blocks[static_cast<size_t>(rank)];
  if (other.live < static_cast<int>(other.threads.size())) {
    fail("reaches for the shared memory of block " + std::to_string(rank) + ", of which threads have returned");
  }
  return other.shared + offset;
}

std::string run_blocks(const Launch& launch, const Kernel& kernel, const void* params,
                       const std::vector<std::pair<int, int>>& places, uint64_t seed) {
  Machine& m = machine();
  m.launch = launch;
  m.kernel = kernel.call;
  m.params = params;
  m.failure.clear();
  m.random.seed(seed);
  m.visibility.random.seed(seed + 1);
  start_blocks(places);
  run_until_all_return();
  m.blocks.clear();
  m.clusters.clear();
  return m.failure;
}

}  // namespace fusedreg::cuda::emulation
