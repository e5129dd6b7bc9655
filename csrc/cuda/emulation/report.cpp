#include <cstring>
#include <map>

#include "machine.h"

namespace fusedreg::cuda::emulation {
namespace {

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

}  // namespace

std::string describe_deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  std::string text = "deadlock: no thread can go on; ";
  int shown = 0;
  for (const auto& block : blocks) {
    if (block->live == 0) continue;
    if (++shown > 4) return text + "...";
    text += describe(*block) + "; ";
  }
  return text;
}

}  // namespace fusedreg::cuda::emulation
