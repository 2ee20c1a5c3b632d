#include "expert_memory.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "pool.h"

namespace moescope {

void ExpertMemory::limit(int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  limit_ = bytes;
  make_room(0);
}

ExpertCounts ExpertMemory::counts() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return {visits_, hits_, bytes_read_, held_bytes_, limit_};
}

size_t ExpertMemory::hold(const ExpertParts& parts, const std::vector<int64_t>& experts,
                          size_t first) {
  std::lock_guard<std::mutex> lock(mutex_);
  int64_t bytes = 0;
  for (const Weights* part : parts) bytes += part->matrix_bytes();
  const size_t fitting = static_cast<size_t>(std::max<int64_t>(1, limit_ / bytes));
  const size_t last = std::min(experts.size(), first + fitting);
  std::vector<int64_t> missing;
  for (size_t i = first; i < last; ++i) {
    const auto found = held_.find({parts[0], experts[i]});
    ++visits_;
    if (found == held_.end()) {
      missing.push_back(experts[i]);
      continue;
    }
    ++hits_;
    ++found->second.holders;
    by_use_.splice(by_use_.end(), by_use_, found->second.place);
  }
  make_room(bytes * static_cast<int64_t>(missing.size()));
  std::atomic<bool> whole{true};  // tasks of the pool may not throw
  const int64_t kinds = static_cast<int64_t>(parts.size());
  parallel(static_cast<int64_t>(missing.size()) * kinds, [&](int64_t task) {
    const Weights& part = *parts[task % kinds];
    const size_t size = static_cast<size_t>(part.matrix_bytes());
    if (!part.stored().bring(size * missing[task / kinds], size)) whole.store(false);
  });
  if (!whole.load()) {
    for (size_t i = first; i < last; ++i)
      if (const auto found = held_.find({parts[0], experts[i]}); found != held_.end())
        --found->second.holders;
    throw std::runtime_error("the experts' file ends too early or cannot be read");
  }
  for (int64_t expert : missing) {
    const Key key{parts[0], expert};
    held_[key] = {parts, bytes, 1, by_use_.insert(by_use_.end(), key)};
    held_bytes_ += bytes;
    bytes_read_ += bytes;
  }
  return last;
}

void ExpertMemory::let_go(const ExpertParts& parts, const std::vector<int64_t>& experts,
                          size_t first, size_t last) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = first; i < last; ++i) --held_.at({parts[0], experts[i]}).holders;
}

void ExpertMemory::forget(const Weights* part) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto at = held_.begin(); at != held_.end();) {
    const ExpertParts& parts = at->second.parts;
    if (std::find(parts.begin(), parts.end(), part) == parts.end()) {
      ++at;
      continue;
    }
    held_bytes_ -= at->second.bytes;
    by_use_.erase(at->second.place);
    at = held_.erase(at);
  }
}

void ExpertMemory::make_room(int64_t bytes) {
  for (auto at = by_use_.begin(); at != by_use_.end() && held_bytes_ + bytes > limit_;) {
    const Key key = *at++;
    if (held_.at(key).holders == 0) drop(key);
  }
}

void ExpertMemory::drop(const Key& key) {
  const auto found = held_.find(key);
  for (const Weights* part : found->second.parts) {
    const size_t size = static_cast<size_t>(part->matrix_bytes());
    part->stored().drop(size * key.second, size);
  }
  held_bytes_ -= found->second.bytes;
  by_use_.erase(found->second.place);
  held_.erase(found);
}

// Never destroyed: weights that outlive it forget themselves there.
ExpertMemory& expert_memory() {
  static ExpertMemory* const made = new ExpertMemory;
  return *made;
}

}  // namespace moescope
