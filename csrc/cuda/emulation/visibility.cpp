#include "visibility.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace fusedreg::cuda::emulation {
namespace {

bool overlap(const Store& store, const unsigned char* from, size_t bytes) {
  return store.address < from + bytes && from < store.address + store.bytes;
}

// What of a store that has not reached memory concerns a load of the same thread, warp or block.
void overlay(const StoreList& list, const unsigned char* from, unsigned char* value, size_t bytes) {
  for (const Store& store : list.stores) {
    if (!overlap(store, from, bytes)) continue;
    const unsigned char* const begin = std::max(store.address, const_cast<unsigned char*>(from));
    const unsigned char* const end = std::min<const unsigned char*>(store.address + store.bytes, from + bytes);
    std::memcpy(value + (begin - from), store.value + (begin - store.address), static_cast<size_t>(end - begin));
  }
}

Store made(const Block* writer, void* to, const void* value, size_t bytes) {
  Store store{static_cast<unsigned char*>(to), static_cast<uint32_t>(bytes), writer, {}};
  std::memcpy(store.value, value, bytes);
  return store;
}

}  // namespace

void Visibility::begin() {
  lists_.clear();
  versions_.clear();
  clock_ = 0;
}

void Visibility::settle() {
  for (StoreList* list : lists_) {
    list->listed = false;
    drain(*list);
  }
  lists_.clear();
}

void Visibility::put(StoreList& list, const Store& store) {
  list.stores.push_back(store);
  if (!list.listed) {
    list.listed = true;
    lists_.push_back(&list);
  }
}

void Visibility::move(StoreList& from, StoreList& to) {
  for (const Store& store : from.stores) put(to, store);
  from.stores.clear();
}

void Visibility::reach_memory(const Store& store) {
  clock_ += 1;
  for (uint32_t offset = 0; store.writer != nullptr && offset + 4 <= store.bytes; offset += 4) {
    Version& version = versions_[reinterpret_cast<uintptr_t>(store.address + offset)];
    std::memcpy(&version.previous, store.address + offset, 4);
    version.time = clock_;
    version.writer = store.writer;
  }
  std::memcpy(store.address, store.value, store.bytes);
}

void Visibility::drain(StoreList& list) {
  for (const Store& store : list.stores) reach_memory(store);
  list.stores.clear();
}

void Visibility::drift() {
  if (lists_.empty() || random.below(16) != 0) return;
  const uint32_t which = random.below(static_cast<uint32_t>(lists_.size()));
  StoreList& list = *lists_[which];
  if (list.stores.empty()) {
    list.listed = false;
    lists_[which] = lists_.back();
    lists_.pop_back();
    return;
  }
  const Store& chosen = list.stores[random.below(static_cast<uint32_t>(list.stores.size()))];
  // Stores to one place keep their order.
  const auto first = std::find_if(list.stores.begin(), list.stores.end(),
                                  [&](const Store& store) { return overlap(store, chosen.address, chosen.bytes); });
  reach_memory(*first);
  list.stores.erase(first);
}

void Visibility::store(Thread& thread, void* to, const void* value, size_t bytes) {
  put(thread.stores, made(thread.block, to, value, bytes));
}

void Visibility::load(Thread& thread, const void* from, void* value, size_t bytes) {
  const unsigned char* const address = static_cast<const unsigned char*>(from);
  unsigned char* const to = static_cast<unsigned char*>(value);
  std::memcpy(to, address, bytes);
  for (size_t offset = 0; offset + 4 <= bytes && !versions_.empty(); offset += 4) {
    const auto found = versions_.find(reinterpret_cast<uintptr_t>(address + offset));
    if (found == versions_.end()) continue;
    const Version& version = found->second;
    if (version.time > thread.seen && version.writer != thread.block && random.below(2) != 0) {
      std::memcpy(to + offset, &version.previous, 4);
    }
  }
  overlay(thread.block->stores, address, to, bytes);
  overlay(thread.warp->stores, address, to, bytes);
  overlay(thread.stores, address, to, bytes);
}

void Visibility::store_to_cluster(Thread& thread, void* to, const void* value, size_t bytes) {
  put(thread.cluster_stores, made(nullptr, to, value, bytes));
}

void Visibility::load_from_cluster(Thread& thread, const void* from, void* value, size_t bytes) {
  drain(thread.cluster_stores);  // a thread sees its own stores
  std::memcpy(value, from, bytes);
}

void Visibility::fence(Thread& thread) {
  // The older first: what a barrier has handed to the block came before what the thread has stored since.
  drain(thread.block->stores);
  drain(thread.warp->stores);
  drain(thread.stores);
  drain(thread.cluster_stores);
}

void Visibility::store_flag(Thread& thread, uint32_t* flag, uint32_t value) {
  reach_memory(made(thread.block, flag, &value, sizeof(value)));
}

uint32_t Visibility::load_flag(Thread& thread, const uint32_t* flag, bool acquire) {
  const auto found = versions_.find(reinterpret_cast<uintptr_t>(flag));
  if (acquire && found != versions_.end()) thread.seen = std::max(thread.seen, found->second.time);
  return *flag;
}

void Visibility::warp_barrier(Warp& warp, Thread* first, int lanes) {
  uint32_t seen = 0;
  for (Thread* lane = first; lane < first + lanes; ++lane) {
    move(lane->stores, warp.stores);
    seen = std::max(seen, lane->seen);
  }
  for (Thread* lane = first; lane < first + lanes; ++lane) lane->seen = seen;
}

void Visibility::block_barrier(Block& block) {
  uint32_t seen = 0;
  for (Warp& warp : block.warps) move(warp.stores, block.stores);
  for (Thread& thread : block.threads) {
    move(thread.stores, block.stores);
    seen = std::max(seen, thread.seen);
  }
  for (Thread& thread : block.threads) thread.seen = seen;
}

void Visibility::cluster_arrival(Thread& thread) { move(thread.cluster_stores, thread.block->cluster->stores); }

void Visibility::cluster_barrier(Cluster& cluster) { drain(cluster.stores); }

}  // namespace fusedreg::cuda::emulation
