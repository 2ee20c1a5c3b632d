#include <algorithm>
#include <utility>

#include "numbers.h"
#include "ops.h"
#include "pool.h"

namespace moescope {
namespace {

constexpr int64_t kBlock = 256;  // numbers that are skipped together

}  // namespace

void likeliest(const float* logits, int64_t rows, int64_t vocab, int64_t count, int64_t* ids,
               float* values) {
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
  });
}

void log_sums(const float* logits, int64_t rows, int64_t vocab, float scale, float* out) {
  parallel(rows, [&](int64_t row) {
    out[row] = kernels().log_sum_exp(logits + row * vocab, scale, vocab);
  });
}

}  // namespace moescope
