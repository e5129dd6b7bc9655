// The emulated device: a fiber per CUDA thread, resumed in an order drawn from a seed.
//
// A fiber runs until it meets another (a barrier, a warp's operation) or polls; then any thread that can go on goes on.
// So whatever the kernel does not order happens in every order, over enough seeds. One launch runs at a time; blocks
// are alive together only where the hardware promises it: a cooperative grid, a cluster.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../runtime.h"
#include "visibility.h"

namespace fusedreg::cuda::emulation {

constexpr int kLanes = 32;
constexpr int kExchangeBytes = 64;

struct Block;
struct Warp;
struct Cluster;

// Where in the kernel a thread waits, for the report of a deadlock.
struct Place {
  const char* operation = "";
  const char* file = "";
  int line = 0;
};

struct Thread {
  void* stack_pointer = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;
  bool returned = false;
  Place place;
  uint32_t exchanges = 0;            // how many of its warp's operations it has taken part in
  const uint32_t* polled = nullptr;  // the flag it looked at last, and what it saw
  uint32_t polled_value = 0;
  bool arrived = false;  // at the cluster's barrier, without having waited yet
  uint32_t arrival_phase = 0;
  StoreList stores;                                            // for the device, in no barrier yet
  StoreList cluster_stores;                                    // into shared memory of other blocks
  uint32_t seen = 0;                                           // up to when it has seen what others stored
  std::vector<std::pair<uint32_t*, const uint32_t*>> fetches;  // into shared memory, not waited for yet
};

struct Warp {
  int arrived = 0;
  Place place;
  std::vector<Thread*> waiting;
  StoreList stores;
  // Two sets: a slow lane may still read one operation's values while the others have gone on to the next.
  alignas(16) unsigned char slot[2][kLanes][kExchangeBytes];
};

struct Block {
  int x = 0, y = 0;
  int live = 0;
  Cluster* cluster = nullptr;
  int rank = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Thread*> ready;
  std::vector<Thread*> waiting;  // at sync_block
  bool listed = false;           // among the machine's active blocks
  int slow_warp = -1;
  StoreList stores;
  std::unique_ptr<unsigned char[]> memory;
  char* shared = nullptr;
};

struct Cluster {
  std::vector<Block*> blocks;
  int arrived = 0;
  uint32_t phase = 0;
  std::vector<Thread*> waiting;
  StoreList stores;
};

// What a kernel's address points to.
struct Kernel {
  void (*call)(const void* params);
  size_t parameter_bytes;
};

// What the device functions call. All but the last group belong to the running thread.
Thread& running();
void meet_block(const Place& place);
// Gives `value` to the other lanes and returns what lane 0 gave; lane l's follows at l * kExchangeBytes.
const unsigned char* meet_warp(const Place& place, const void* value, size_t bytes);
void arrive_at_cluster(bool release, const Place& place);
void wait_for_cluster(bool wait, const Place& place);
uint32_t poll(const uint32_t* flag, bool acquire, const Place& place);
void publish(uint32_t* flag, uint32_t value, bool release);
void fence();
// The same place in the shared memory of another block of the cluster.
char* shared_of(const char* address, int rank, size_t bytes);
void give_way();  // lets others run, or not, as the seed has it
Visibility& visibility();
uint64_t virtual_nanoseconds();
const Launch& launched();
[[noreturn]] void fail(const std::string& message);

// Runs blocks that are alive together, in the clusters that the launch asks for; why it failed, or nothing.
std::string run_blocks(const Launch& launch, const Kernel& kernel, const void* params,
                       const std::vector<std::pair<int, int>>& places, uint64_t seed);
std::string describe_deadlock(const std::vector<std::unique_ptr<Block>>& blocks);

// What the host sets.
void set_limits(const DeviceLimits& limits);
void set_schedule(uint64_t seed);

}  // namespace fusedreg::cuda::emulation
