#include "workspace.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedreg::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLargestKept = size_t{128} << 20;
constexpr int kBlocksKept = 2;

// A block's size stands in its first bytes; what the caller gets begins one cache line later.
constexpr size_t kHeader = 64;

std::atomic<char*> kept[kBlocksKept];

size_t size_of(const char* block) {
  size_t bytes;
  std::memcpy(&bytes, block, sizeof(bytes));
  return bytes;
}

char* allocate(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 4096;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  char* block = static_cast<char*>(std::aligned_alloc(alignment, bytes));
  if (block == nullptr) throw std::bad_alloc();
  advise_huge_pages(block, bytes);
  std::memcpy(block, &bytes, sizeof(bytes));
  return block;
}

char* take(size_t bytes) {
  for (auto& slot : kept) {
    char* block = slot.exchange(nullptr, std::memory_order_acq_rel);
    if (block == nullptr) continue;
    if (size_of(block) >= bytes) return block;
    std::free(block);  // too small: the larger one that is made now takes its place
  }
  return allocate(bytes);
}

void give_back(char* block) {
  if (size_of(block) <= kLargestKept) {
    for (auto& slot : kept) {
      char* expected = nullptr;
      if (slot.compare_exchange_strong(expected, block, std::memory_order_acq_rel)) return;
    }
  }
  std::free(block);
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  // Advice: where the system will not, ordinary pages serve as well.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

Workspace::Workspace(size_t bytes) : data_(take(bytes + kHeader) + kHeader) {
#if defined(FUSEDREG_POISON_WORKSPACE)
  std::memset(data_, 0xFF, bytes);  // NaN in every floating-point type: what reads before it writes is found out
#endif
}

Workspace::~Workspace() { give_back(data_ - kHeader); }

}  // namespace fusedreg::cpu
