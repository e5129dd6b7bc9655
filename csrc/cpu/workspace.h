// Scratch memory: aligned, on huge pages where the system gives them, kept for the next call.
//
// A call needs megabytes that live as long as it does; asking the system for them each time costs a page fault for
// every 4 KB. A few blocks are kept, so that calls from several threads at once each find one. Lock-free: a fork in
// the middle of a call leaves nothing locked in the child.
#pragma once

#include <cstddef>

namespace fusedreg::cpu {

class Workspace {
 public:
  explicit Workspace(size_t bytes);  // throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
};

// Asks for huge pages under a large buffer that is about to be written for the first time.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace fusedreg::cpu
