// Choices of a tier that have been made: the search costs tens of microseconds, a layer of one step takes less.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "plan.h"

namespace fusedreg::cuda {

// From all that a choice depends on, as numbers, to the choice.
class ChoiceCache {
 public:
  using Key = std::vector<int64_t>;

  // make() is called where there is none yet; what it throws is not remembered.
  template <class Make>
  std::shared_ptr<const Choice> find(const Key& key, const Make& make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = choices_.find(key);
    if (found != choices_.end()) return found->second;
    if (choices_.size() >= kMost) choices_.clear();  // lengths of real text vary without end
    auto made = std::make_shared<const Choice>(make());
    choices_.emplace(key, made);
    return made;
  }

 private:
  static constexpr size_t kMost = 4096;
  std::mutex mutex_;
  std::map<Key, std::shared_ptr<const Choice>> choices_;
};

}  // namespace fusedreg::cuda
