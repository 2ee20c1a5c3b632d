#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace moescope {
namespace {

constexpr auto kSpin = std::chrono::microseconds(200);  // then a thread without work sleeps

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// Tasks of one thread that nobody has begun; their numbers have 32 bits. It takes them from the front,
// so that what it reads lies together; others, who have none left, take from the back.
class alignas(64) Share {
 public:
  void set(int64_t first, int64_t end) { span_.store(pack(first, end), std::memory_order_relaxed); }

  // The next task from the front or from the back; -1 if there is none.
  int64_t take(bool front) {
    uint64_t span = span_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t first = static_cast<int64_t>(span >> 32), end = span & 0xffffffffu;
      if (first == end) return -1;
      const uint64_t rest = front ? pack(first + 1, end) : pack(first, end - 1);
      if (span_.compare_exchange_weak(span, rest, std::memory_order_relaxed))
        return front ? first : end - 1;
    }
  }

 private:
  static uint64_t pack(int64_t first, int64_t end) {
    return static_cast<uint64_t>(first) << 32 | static_cast<uint64_t>(end);
  }

  std::atomic<uint64_t> span_{0};
};

// A round of work is open while the lowest bit of `gate_` is set; the bits above count the threads
// that joined it, and the upper half numbers the rounds. Whoever opened a round works until no task
// is left, closes it, and waits only for those that joined: a thread that the system has put aside
// holds up nobody, and after a fork, where no thread is left, the caller does all alone.
class Pool {
 public:
  Pool() { start(usable_cores()); }
  ~Pool() { stop(); }

  void run(int64_t count, const std::function<void(int64_t)>& task) {
    std::lock_guard<std::mutex> turn(turn_);
    if (count == 1 || workers_.empty()) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    task_ = &task;
    const int64_t parts = static_cast<int64_t>(shares_.size());
    for (int64_t part = 0; part < parts; ++part)
      shares_[part].set(count * part / parts, count * (part + 1) / parts);
    next_.store(0, std::memory_order_relaxed);
    left_.store(0, std::memory_order_relaxed);
    const uint64_t round = (gate_.load(std::memory_order_relaxed) >> 32) + 1;
    gate_.store(round << 32 | kOpen);  // sequentially consistent, as is the check of sleepers_
    if (sleepers_.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(sleep_);
      }
      wake_.notify_all();
    }
    work();
    const uint64_t joined = (gate_.fetch_and(~kOpen) & 0xffffffffu) >> 1;
    while (left_.load(std::memory_order_acquire) != joined) relax();
  }

  uint64_t rounds() const { return gate_.load(std::memory_order_relaxed) >> 32; }

  int size() const { return size_.load(std::memory_order_relaxed); }

  void resize(int count) {
    std::lock_guard<std::mutex> turn(turn_);
    stop();
    start(std::max(1, count));
  }

 private:
  static constexpr uint64_t kOpen = 1, kOne = 2;

  void start(int count) {
    stopping_.store(false);
    shares_ = std::vector<Share>(count);
    for (int i = 1; i < count; ++i) workers_.emplace_back([this] { serve(); });
    size_.store(count, std::memory_order_relaxed);
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      stopping_.store(true);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  void work() {
    const size_t own = next_.fetch_add(1, std::memory_order_relaxed);
    for (size_t i = 0; i < shares_.size(); ++i) {
      Share& share = shares_[(own + i) % shares_.size()];
      for (int64_t task; (task = share.take(i == 0)) >= 0;) (*task_)(task);
    }
  }

  bool has_news(uint64_t seen) const {
    const uint64_t gate = gate_.load();
    return stopping_.load() || ((gate & kOpen) && gate >> 32 != seen);
  }

  void serve() {
    uint64_t seen = 0;  // the last round that this thread joined
    while (await(seen)) {
      uint64_t gate = gate_.load();
      while ((gate & kOpen) && gate >> 32 != seen) {
        if (!gate_.compare_exchange_weak(gate, gate + kOne)) continue;
        seen = gate >> 32;
        work();
        left_.fetch_add(1, std::memory_order_release);
      }
    }
  }

  // Wait for a round other than `seen`; false when the pool stops.
  bool await(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i) {
        if (has_news(seen)) return !stopping_.load();
        relax();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return has_news(seen); });
    sleepers_.fetch_sub(1);
    return !stopping_.load();
  }

  std::vector<std::thread> workers_;
  std::vector<Share> shares_;  // one a thread
  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> gate_{0};
  std::atomic<size_t> next_{0};  // share, of which a thread that joins begins
  std::atomic<uint64_t> left_{0};
  std::atomic<int> sleepers_{0}, size_{1};
  std::atomic<bool> stopping_{false};
  const std::function<void(int64_t)>* task_ = nullptr;
};

// Never destroyed: at exit the threads may already be gone, and the system ends them anyway.
Pool& pool() {
  static Pool* const made = new Pool;
  return *made;
}

}  // namespace

void parallel(int64_t count, const std::function<void(int64_t)>& task) { pool().run(count, task); }

void parallel_rows(int64_t rows, const std::function<void(int64_t, int64_t)>& task) {
  constexpr int64_t kFew = 8, kAtOnce = 16;
  if (rows <= kFew) return task(0, rows);
  const int64_t step = std::min(kAtOnce, (rows + threads() - 1) / threads());
  parallel((rows + step - 1) / step,
           [&](int64_t part) { task(part * step, std::min(rows, (part + 1) * step)); });
}

uint64_t rounds_begun() { return pool().rounds(); }

int threads() { return pool().size(); }

void set_threads(int count) { pool().resize(count); }

}  // namespace moescope
