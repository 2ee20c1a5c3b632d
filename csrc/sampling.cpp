#include <algorithm>
#include <limits>
#include <utility>

#include "ops.h"
#include "pool.h"

namespace moescope {
namespace {

constexpr int64_t kLanes = 16, kBlock = 256;  // numbers that are skipped together

float largest(const float* x, int64_t n) {
  float lanes[kLanes], most = x[0];
  std::fill_n(lanes, kLanes, -std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane)
      lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
  for (float lane : lanes) most = std::max(most, lane);
  for (; i < n; ++i) most = std::max(most, x[i]);
  return most;
}

}  // namespace

void likeliest(const float* logits, int64_t rows, int64_t vocab, int64_t count, int64_t* ids,
               float* values, float* log_sums) {
  parallel(rows, [&](int64_t row) {
    const float* x = logits + row * vocab;
    std::vector<std::pair<float, int64_t>> best;  // in order
    const auto before = [](const auto& a, const auto& b) { return a.first > b.first; };
    for (int64_t start = 0; start < vocab; start += kBlock) {
      const int64_t end = std::min(start + kBlock, vocab);
      const bool full = static_cast<int64_t>(best.size()) == count;
      if (full && largest(x + start, end - start) <= best.back().first) continue;
      for (int64_t id = start; id < end; ++id) {
        if (static_cast<int64_t>(best.size()) == count) {
          if (x[id] <= best.back().first) continue;
          best.pop_back();
        }
        const std::pair<float, int64_t> entry{x[id], id};
        best.insert(std::upper_bound(best.begin(), best.end(), entry, before), entry);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      values[row * count + i] = best[i].first;
      ids[row * count + i] = best[i].second;
    }
    log_sums[row] = kernels().log_sum_exp(x, vocab);
  });
}

}  // namespace moescope
