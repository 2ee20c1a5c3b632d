#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "numbers.h"
#include "ops.h"
#include "pool.h"

namespace moescope {
namespace {

constexpr int64_t kBlock = 256;     // numbers that are skipped together
constexpr int64_t kInserted = 128;  // more are found together and then put in order

using Entry = std::pair<float, int64_t>;  // a logit and its id

// The few greatest, in order, each put in its place when it is met.
std::vector<Entry> few(const float* x, int64_t vocab, int64_t count) {
  std::vector<Entry> best;
  const auto before = [](const Entry& a, const Entry& b) { return a.first > b.first; };
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t end = std::min(start + kBlock, vocab);
    const bool full = static_cast<int64_t>(best.size()) == count;
    if (full && largest(x + start, end - start) <= best.back().first) continue;
    for (int64_t id = start; id < end; ++id) {
      if (static_cast<int64_t>(best.size()) == count) {
        if (x[id] <= best.back().first) continue;
        best.pop_back();
      }
      const Entry entry{x[id], id};
      best.insert(std::upper_bound(best.begin(), best.end(), entry, before), entry);
    }
  }
  return best;
}

std::vector<Entry> many(const float* x, int64_t vocab, int64_t count) {
  std::vector<Entry> all(vocab);
  for (int64_t id = 0; id < vocab; ++id)
    all[id] = {std::isnan(x[id]) ? -std::numeric_limits<float>::infinity() : x[id], id};
  const auto before = [](const Entry& a, const Entry& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  if (count < vocab) std::nth_element(all.begin(), all.begin() + count, all.end(), before);
  std::sort(all.begin(), all.begin() + count, before);
  return all;
}

}  // namespace

void likeliest(const float* logits, int64_t rows, int64_t vocab, int64_t count, int64_t* ids,
               float* values) {
  parallel(rows, [&](int64_t row) {
    const auto found = count <= kInserted ? few : many;
    const std::vector<Entry> best = found(logits + row * vocab, vocab, count);
    for (int64_t i = 0; i < count; ++i) {
      values[row * count + i] = best[i].first;
      ids[row * count + i] = best[i].second;
    }
  });
}

void log_sums(const float* logits, int64_t rows, int64_t vocab, const float* scales, float* out) {
  parallel(rows, [&](int64_t row) {
    out[row] = kernels().log_sum_exp(logits + row * vocab, scales[row], vocab);
  });
}

}  // namespace moescope
