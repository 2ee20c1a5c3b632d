// One pool of threads for all kernels.
#pragma once
#include <cstdint>
#include <functional>

namespace moescope {

// Call `task(i)` once for each i in [0, count), on the calling thread and on those of the pool that
// are awake in time; return when all calls have returned. Tasks are handed out one at a time, so
// uneven ones still end together. Calls from several threads take turns.
void parallel(int64_t count, const std::function<void(int64_t)>& task);

// Call `task(first, last)` for ranges that together make up [0, rows): one where rows are few, else
// several in parallel.
void parallel_rows(int64_t rows, const std::function<void(int64_t, int64_t)>& task);

// Threads that share the work, the caller's included.
int threads();

// Rounds of work that threads shared so far; it wraps.
uint64_t rounds_begun();

// Use `count` threads from the next call on.
void set_threads(int count);

}  // namespace moescope
