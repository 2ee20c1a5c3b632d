// Experts of models larger than memory: read from their pack when a token visits them, kept under a
// limit, and dropped by use.
#pragma once
#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "weights.h"

namespace moescope {

// The matrices that an expert has one of each: gate, up and down.
using ExpertParts = std::vector<const Weights*>;

struct ExpertCounts {
  int64_t visits, hits;  // experts asked for, and those of them that were in memory
  int64_t bytes_read, held, limit;
};

// All streamed experts of a process share one.
class ExpertMemory {
 public:
  void limit(int64_t bytes);
  ExpertCounts counts() const;

  // Bring in as many of a layer's `experts` from `first` on as fit under the limit together, one at
  // least, and keep them until they are let go. Returns where the others begin. Throws
  // std::runtime_error where the file cannot be read.
  size_t hold(const ExpertParts& parts, const std::vector<int64_t>& experts, size_t first);
  void let_go(const ExpertParts& parts, const std::vector<int64_t>& experts, size_t first,
              size_t last);
  // Weights that are about to exist no longer.
  void forget(const Weights* part);

 private:
  using Key = std::pair<const Weights*, int64_t>;  // an expert's gate and number
  struct Held {
    ExpertParts parts;
    int64_t bytes;
    int holders;
    std::list<Key>::iterator place;
  };
  void make_room(int64_t bytes);
  void drop(const Key& key);

  mutable std::mutex mutex_;
  std::map<Key, Held> held_;
  std::list<Key> by_use_;  // the longest unused first
  int64_t limit_ = 0, held_bytes_ = 0, visits_ = 0, hits_ = 0, bytes_read_ = 0;
};

ExpertMemory& expert_memory();

}  // namespace moescope
