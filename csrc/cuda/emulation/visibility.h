// When other threads see a store: as late, and in as strange an order, as the memory model allows.
//
// A store between blocks (store_exchanged, store_to_block) waits in a list of its thread. From there it may reach
// memory at any time, in any order but that of stores to the same place. What brings it there for certain: a fence or a
// release, of its own thread or, after a barrier in between, of another thread of its warp or block; for a store into
// another block's shared memory, the cluster's barrier.
//
// On the reading side, memory keeps a word's last value but one, and a clock says when the last came. A thread has
// seen the clock up to a time, which an acquire of a flag advances to when that flag was stored, and which barriers
// hand to the others. A load may return the value before last, unless the last came before what its thread has seen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "random.h"

namespace fusedreg::cuda::emulation {

struct Block;
struct Cluster;
struct Thread;
struct Warp;

struct Store {
  unsigned char* address;
  uint32_t bytes;
  const Block* writer;  // null for stores into shared memory, whose loads are ordinary ones
  unsigned char value[16];
};

// Stores that have not reached memory, oldest first.
struct StoreList {
  std::vector<Store> stores;
  bool listed = false;  // among those from which stores reach memory by chance
};

class Visibility {
 public:
  void begin();   // before a launch: everything is visible
  void settle();  // everything reaches memory: at its end, and where nothing else can happen

  void store(Thread& thread, void* to, const void* value, size_t bytes);
  void load(Thread& thread, const void* from, void* value, size_t bytes);
  void store_to_cluster(Thread& thread, void* to, const void* value, size_t bytes);
  void load_from_cluster(Thread& thread, const void* from, void* value, size_t bytes);

  void fence(Thread& thread);
  // A flag's new value, at once. Whether what came before it is seen too is the fence's affair.
  void store_flag(Thread& thread, uint32_t* flag, uint32_t value);
  uint32_t load_flag(Thread& thread, const uint32_t* flag, bool acquire);

  void warp_barrier(Warp& warp, Thread* first, int lanes);
  void block_barrier(Block& block);
  void cluster_arrival(Thread& thread);
  void cluster_barrier(Cluster& cluster);

  // Perhaps lets one store reach memory.
  void drift();

  Random random;

 private:
  struct Version {
    uint32_t previous = 0;
    uint32_t time = 0;  // when the word's present value came
    const Block* writer = nullptr;
  };

  void put(StoreList& list, const Store& store);
  void move(StoreList& from, StoreList& to);
  void reach_memory(const Store& store);
  void drain(StoreList& list);

  std::vector<StoreList*> lists_;
  std::unordered_map<uintptr_t, Version> versions_;  // of words that were stored since begin(), by address
  uint32_t clock_ = 0;
};

}  // namespace fusedreg::cuda::emulation
