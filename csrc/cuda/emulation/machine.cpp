#include "machine.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "fiber.h"

namespace fusedreg::cuda::emulation {
namespace {

constexpr size_t kMargin = 4096;            // around a block's shared memory, to find what is written beside it
constexpr unsigned char kPoison = 0xFF;     // NaN in every floating-point type
constexpr uint64_t kJump = 1'000'000'000;   // nanoseconds by which time advances where all threads only poll
constexpr int kJumpsBeforeDeadlock = 1000;  // far beyond any bounded wait
constexpr int kMostClusterBlocks = 16;

struct Machine {
  Launch launch;
  const char* name = "";
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
  uint64_t schedule = 0, launches = 0;
  DeviceLimits limits{132, 227 * 1024, 9, 0};
  Stacks stacks;
  void* scheduler = nullptr;  // the host's own stack, while a thread runs
  Thread* running = nullptr;
  std::mutex one_launch;
};

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

std::string kernel_name(const char* pretty) {
  const std::string text = pretty;
  const size_t start = text.find("kernel = ");
  if (start == std::string::npos) return text;
  const size_t end = text.find_first_of(";]", start);
  return text.substr(start + 9, end == std::string::npos ? end : end - start - 9);
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

std::string describe(const Block& block) {
  std::map<std::string, int> counts;
  for (const Thread& thread : block.threads) {
    std::string where = "returned";
    if (!thread.returned) {
      const char* const slash = std::strrchr(thread.place.file, '/');
      where = std::string("at ") + thread.place.operation + " (" + (slash != nullptr ? slash + 1 : thread.place.file) +
              ":" + std::to_string(thread.place.line) + ")";
    }
    counts[where] += 1;
  }
  std::string text = "block " + std::to_string(block.x);
  if (block.y != 0) text += "," + std::to_string(block.y);
  const char* separator = ": ";
  for (const auto& [where, count] : counts) {
    text += separator + std::to_string(count) + (count == 1 ? " thread " : " threads ") + where;
    separator = ", ";
  }
  return text;
}

std::string describe_deadlock() {
  std::string text = "deadlock: no thread can go on; ";
  int shown = 0;
  for (const auto& block : machine().blocks) {
    if (block->live == 0) continue;
    if (++shown > 4) return text + "...";
    text += describe(*block) + "; ";
  }
  return text;
}

// Nothing can go on by itself: time passes for those that poll, and where nobody does, nothing ever will.
void pass_time() {
  Machine& m = machine();
  if (m.parked.empty() || ++m.jumps > kJumpsBeforeDeadlock) {
    m.failure = describe_deadlock();
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

// Runs blocks that are alive together, in clusters of `cluster` blocks that follow one another.
void run_together(const std::vector<std::pair<int, int>>& places, int cluster) {
  Machine& m = machine();
  m.blocks.clear();
  m.clusters.clear();
  m.active.clear();
  m.parked.clear();
  m.turn = nullptr;
  m.burst = 0;
  m.jumps = 0;
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

  while (m.live > 0 && m.failure.empty()) {
    Thread* const next = choose();
    if (next == nullptr) {
      pass_time();
      continue;
    }
    m.nanoseconds += 10;
    m.running = next;
    fusedreg_emulation_switch(&m.scheduler, next->stack_pointer);
    m.running = nullptr;
  }
  if (m.failure.empty()) check_margins();
}

void check_launch(const Launch& launch, const DeviceLimits& limits) {
  const auto refuse = [](const std::string& why) { throw std::runtime_error(why); };
  if (launch.threads < kLanes || launch.threads > 1024 || launch.threads % kLanes != 0) {
    refuse("a block has 32 to 1024 threads, whole warps of them, got " + std::to_string(launch.threads));
  }
  if (launch.grid_x < 1 || launch.grid_y < 1) refuse("the grid has no blocks");
  if (launch.shared_bytes > static_cast<size_t>(limits.shared_bytes_per_block)) {
    refuse("asks for " + std::to_string(launch.shared_bytes) + " bytes of shared memory a block, the device has " +
           std::to_string(limits.shared_bytes_per_block));
  }
  // A multiprocessor is taken to hold one block: what persistent kernels count on, given the registers they use.
  if (launch.cooperative && launch.grid_x * launch.grid_y > limits.multiprocessors) {
    refuse("a cooperative grid of " + std::to_string(launch.grid_x * launch.grid_y) +
           " blocks cannot be resident as a whole on " + std::to_string(limits.multiprocessors) + " multiprocessors");
  }
  if (launch.cluster > 1) {
    if (limits.major < 9) refuse("clusters need compute capability 9.0");
    if (launch.cluster > kMostClusterBlocks) refuse("a cluster of " + std::to_string(launch.cluster) + " blocks");
    if (launch.grid_x % launch.cluster != 0) refuse("the grid is no multiple of the cluster");
  }
}

void run_grid() {
  Machine& m = machine();
  const int cluster = std::max(1, m.launch.cluster);
  std::vector<std::pair<int, int>> places;
  for (int y = 0; y < m.launch.grid_y; ++y) {
    for (int x = 0; x < m.launch.grid_x; ++x) places.emplace_back(x, y);
  }
  const size_t together = m.launch.cooperative ? places.size() : static_cast<size_t>(cluster);
  std::vector<size_t> order(places.size() / together);
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t left = order.size(); left > 1; --left) {
    std::swap(order[left - 1], order[m.random.below(static_cast<uint32_t>(left))]);
  }
  for (const size_t group : order) {
    const auto first = places.begin() + static_cast<std::ptrdiff_t>(group * together);
    run_together({first, first + static_cast<std::ptrdiff_t>(together)}, cluster);
    if (!m.failure.empty()) return;
  }
}

}  // namespace

Thread& running() { return *machine().running; }
const Launch& launched() { return machine().launch; }
uint64_t virtual_nanoseconds() { return machine().nanoseconds; }
void set_limits(const DeviceLimits& limits) { machine().limits = limits; }
DeviceLimits limits() { return machine().limits; }

void set_schedule(uint64_t seed) {
  machine().schedule = seed;
  machine().launches = 0;
}

void fail(const std::string& message) {
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
  if (warp.waiting.size() == kLanes) wake_all(warp.waiting);
  switch_to_scheduler();
  return slots[0];
}

void arrive_at_cluster(const Place& place) {
  Machine& m = machine();
  Thread& thread = *m.running;
  Cluster& cluster = *thread.block->cluster;
  if (thread.arrived) fail("arrives at the cluster's barrier twice, line " + std::to_string(place.line));
  thread.arrived = true;
  thread.arrival_phase = cluster.phase;
  if (++cluster.arrived == static_cast<int>(cluster.blocks.size()) * m.launch.threads) {
    cluster.arrived = 0;
    cluster.phase += 1;
    m.jumps = 0;
    wake_all(cluster.waiting);
  }
  give_way();
}

void wait_for_cluster(const Place& place) {
  Machine& m = machine();
  Thread& thread = *m.running;
  Cluster& cluster = *thread.block->cluster;
  if (!thread.arrived) fail("waits for a cluster it has not arrived at, line " + std::to_string(place.line));
  if (cluster.phase == thread.arrival_phase) {
    thread.place = place;
    cluster.waiting.push_back(&thread);
    switch_to_scheduler();
  } else {
    yield();
  }
  thread.arrived = false;
}

uint32_t poll(const uint32_t* flag, const Place& place) {
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
  thread.polled_value = *flag;
  return thread.polled_value;
}

void publish(uint32_t* flag, uint32_t value) {
  Machine& m = machine();
  *flag = value;
  m.jumps = 0;
  wake_all(m.parked);
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

}  // namespace fusedreg::cuda::emulation

namespace fusedreg::cuda {

using emulation::machine;

void launch_kernel(const void* kernel, const char* pretty, const Launch& launch, void* params) {
  emulation::Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.one_launch);
  const std::string name = emulation::kernel_name(pretty);
  try {
    emulation::check_launch(launch, m.limits);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error("CUDA emulation: " + name + ": " + error.what());
  }
  m.launch = launch;
  m.kernel = reinterpret_cast<void (*)(const void*)>(const_cast<void*>(kernel));
  m.params = params;
  m.failure.clear();
  m.random.seed(m.schedule * 1'000'003 + m.launches++);
  emulation::run_grid();
  m.blocks.clear();
  m.clusters.clear();
  if (!m.failure.empty()) throw std::runtime_error("CUDA emulation: " + name + ": " + m.failure);
}

int largest_cluster_of(const void*, const char*, int, size_t shared_bytes) {
  const DeviceLimits limits = emulation::limits();
  const bool fits = shared_bytes <= static_cast<size_t>(limits.shared_bytes_per_block);
  return limits.major < 9 || !fits ? 0 : emulation::kMostClusterBlocks;
}

DeviceLimits device_limits() { return emulation::limits(); }
void clear_async(void* memory, size_t bytes, void*) { std::memset(memory, 0, bytes); }
void copy_async(void* to, const void* from, size_t bytes, void*) { std::memmove(to, from, bytes); }

}  // namespace fusedreg::cuda
