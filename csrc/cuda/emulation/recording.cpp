#include "recording.h"

#include <utility>
#include <vector>

namespace fusedreg::cuda::emulation {
namespace {

struct Record {
  bool open = false;
  std::vector<std::function<void()>> work;
  std::vector<std::shared_ptr<void>> memory;
};

Record& record() {
  static Record the_record;
  return the_record;
}

}  // namespace

void perform(std::function<void()> work) {
  work();
  if (record().open) record().work.push_back(std::move(work));
}

void keep_alive(std::shared_ptr<void> memory) {
  if (record().open) record().memory.push_back(std::move(memory));
}

void start_recording() {
  forget_recording();
  record().open = true;
}

size_t replay() {
  record().open = false;
  for (const auto& work : record().work) work();
  return record().work.size();
}

void forget_recording() { record() = {}; }

}  // namespace fusedreg::cuda::emulation
