#include "settling.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace moescope {
namespace {

class Settler {
 public:
  void add(const std::shared_ptr<Weights>& weights) {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back(weights);
  }

  void start() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (running_ || waiting_.empty()) return;
    running_ = true;
    std::thread([this] { run(); }).detach();
  }

  int64_t left() {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t bytes = 0;
    for (const auto& waiting : waiting_)
      if (const auto weights = waiting.lock()) bytes += weights->stored().size();
    return static_cast<int64_t>(bytes);
  }

 private:
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!waiting_.empty()) {
      const std::shared_ptr<Weights> weights = waiting_.front().lock();
      lock.unlock();
      if (weights) weights->stored().settle();
      lock.lock();
      waiting_.pop_front();
    }
    running_ = false;
  }

  std::mutex mutex_;
  std::deque<std::weak_ptr<Weights>> waiting_;
  bool running_ = false;
};

// Never destroyed: at exit its thread may still be at work, and the system ends it anyway.
Settler& settler() {
  static Settler* const made = new Settler;
  return *made;
}

}  // namespace

void settle_later(const std::shared_ptr<Weights>& weights) { settler().add(weights); }
void settle() { settler().start(); }
int64_t unsettled() { return settler().left(); }

}  // namespace moescope
