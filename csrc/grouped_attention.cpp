#include <algorithm>
#include <cmath>

#include "attend.h"
#include "numbers.h"
#include "ops.h"
#include "pool.h"

namespace moescope {

namespace {

// In place, for one number of `width` after another.
void normalise(const Norm& norm, float* x, int64_t width) {
  if (norm.weight.empty()) return;
  for (int64_t start = 0; start < width; start += norm.width()) norm.forward(x + start, x + start);
}

void clamp(float* x, int64_t n, float bound) {
  for (int64_t i = 0; i < n; ++i) x[i] = std::min(std::max(x[i], -bound), bound);
}

}  // namespace

void GroupedAttention::forward(float* x, const Tokens& tokens, Half half, const Slots& keys,
                               const Slots& values) const {
  static thread_local QuantizedRows caller_rounded;
  static thread_local std::vector<float> caller_queries, caller_keys, caller_values, caller_mixed;
  QuantizedRows& rounded = caller_rounded;  // the caller's, seen by all threads
  const int64_t count = tokens.count(), kv_width = kv_heads * width;
  const bool stores = half != Half::look, looks = half != Half::store;
  grow(caller_queries, count * heads * width);
  grow(caller_keys, count * kv_width);
  grow(caller_values, count * kv_width);
  grow(caller_mixed, count * heads * width);
  float* queries = caller_queries.data();    // (tokens, heads, width)
  float* new_keys = caller_keys.data();      // (tokens, kv heads, width)
  float* new_values = caller_values.data();  // (tokens, kv heads, width)
  float* mixed = caller_mixed.data();        // (tokens, heads, width)

  round_normed(input_norm, {query.weights.get(), key.weights.get(), value.weights.get()}, x, count,
               rounded);
  std::vector<Product> products;
  if (looks) products.push_back(query.to(queries));
  if (stores) products.insert(products.end(), {key.to(new_keys), value.to(new_values)});
  multiply_all(products, rounded, count);
  parallel_rows(count, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> unrotated;
    grow(unrotated, rope);
    for (int64_t token = first; token < last; ++token) {
      const auto prepare = [&](const Norm& norm, float* numbers, int64_t all) {
        normalise(norm, numbers, all * width);
        if (std::isfinite(clip)) clamp(numbers, all * width, clip);
        for (float* rotated = numbers; rotated < numbers + all * width; rotated += width) {
          std::copy_n(rotated, rope, unrotated.data());
          rotate(unrotated.data(), tokens.cosine + token * (rope / 2),
                 tokens.sine + token * (rope / 2), rope, interleave, rotated);
        }
      };
      if (looks) prepare(query_norm, queries + token * heads * width, heads);
      if (!stores) continue;
      float *token_keys = new_keys + token * kv_width,
            *token_values = new_values + token * kv_width;
      prepare(key_norm, token_keys, kv_heads);
      if (std::isfinite(clip)) clamp(token_values, kv_width, clip);
      const int64_t row = tokens.row_of[token], slot = tokens.positions[token];
      keys.put(row, slot, token_keys);
      values.put(row, slot, token_values);
    }
  });
  if (!looks) return;

  if (keys.bf16)
    attend<Bf16>(queries, tokens, keys, values, mixed);
  else
    attend<float>(queries, tokens, keys, values, mixed);
  rounded.resize(*output.weights, count);
  parallel_rows(count, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token)
      rounded.set_row(token, mixed + token * heads * width);
  });
  multiply_all({output.add_to(x, residual_multiplier)}, rounded, count);
}

template <typename T>
void GroupedAttention::attend(const float* queries, const Tokens& tokens, const Slots& keys,
                              const Slots& values, float* mixed) const {
  attend_singly<T>(queries, tokens, keys, values, mixed);
  for (int64_t row = tokens.singles; row < tokens.rows; ++row) {
    const int64_t first = tokens.starts[row], seq = tokens.starts[row + 1] - first;
    attend_prompt<T>(queries + first * heads * width, seq, tokens.positions + first, row, keys,
                     values, mixed + first * heads * width);
  }
}

template <typename T>
void GroupedAttention::attend_singly(const float* queries, const Tokens& tokens, const Slots& keys,
                                     const Slots& values, float* mixed) const {
  static thread_local std::vector<float> caller_found;
  const int64_t group = heads / kv_heads;
  const int64_t most_heads = attention_loops<T>(kernels()).heads;  // of a bundle
  const int64_t* positions = tokens.positions;
  const auto first_run = [&](int64_t row) { return lookback().first_slot(positions[row]) / kRun; };
  const auto runs = [&](int64_t row) { return runs_of(positions[row] + 1) - first_run(row); };
  int64_t most = 0;
  for (int64_t row = 0; row < tokens.singles; ++row) most = std::max(most, runs(row));
  Findings findings(caller_found, tokens.singles * heads, most, width);
  const auto finish = [&](int64_t head) {
    findings.join(head, runs(head / heads), scale, mixed + head * width);
  };
  // All heads that share a key walk together, unless that leaves a thread without work.
  const int64_t walks = tokens.singles * most * kv_heads;
  const int64_t at_once = walks < threads() ? std::min<int64_t>(kHeads, group) : group;
  const int64_t parts = (group + at_once - 1) / at_once;
  parallel(walks * parts, [&](int64_t task) {
    static thread_local std::vector<float> memory;
    static thread_local std::vector<Bundle<T>> walking;
    const int64_t kv_head = task / parts % kv_heads, run = task / (parts * kv_heads) % most;
    const int64_t row = task / (parts * kv_heads * most);
    const int64_t start = (first_run(row) + run) * kRun, last = positions[row];
    if (start > last) return;
    const int64_t stop = std::min(start + kRun, last + 1);
    const int64_t first = kv_head * group + task % parts * at_once;
    const int64_t end = std::min(first + at_once, (kv_head + 1) * group);
    const typename Bundle<T>::Widths widths{width, 0, width};
    const int64_t size = Bundle<T>::size(widths);
    const int64_t count = (end - first + most_heads - 1) / most_heads;
    float* zeroed = zeros(memory, count * size);
    walking.clear();
    for (int64_t b = 0; b < count; ++b)
      walking.emplace_back(zeroed + b * size, widths,
                           std::min(most_heads, end - first - b * most_heads));
    for (int64_t h = first; h < end; ++h) {
      Bundle<T>& bundle = walking[(h - first) / most_heads];
      bundle.set_query((h - first) % most_heads, queries + (row * heads + h) * width);
      if (!sinks.empty() && run == 0) bundle.add_sink((h - first) % most_heads, sinks[h], scale);
    }
    int64_t met;
    for (int64_t slot = std::max(start, lookback().first_slot(last)); slot < stop; slot += met) {
      met = std::min({kSlotBlock, stop - slot, keys.together(slot)});
      const bool more = slot + met < stop;
      const auto run_of = [&](const Slots& slots) -> SlotRun<T> {
        return {slots.at<T>(row, slot) + kv_head * width, slots.slot_stride, width,
                more ? slots.at<T>(row, slot + met) + kv_head * width : nullptr};
      };
      const SlotRun<T> met_keys = run_of(keys), met_values = run_of(values);
      for (int64_t b = 0; b < count; ++b)
        walking[b].visit(met_keys, nullptr, met_values, met, scale, b, count);
    }
    for (int64_t h = first; h < end; ++h) {
      findings.put(row * heads + h, run, walking[(h - first) / most_heads],
                   (h - first) % most_heads);
      if (most == 1) finish(row * heads + h);
    }
  });
  if (most > 1) parallel(tokens.singles * heads, finish);
}

template <typename T>
void GroupedAttention::attend_prompt(const float* queries, int64_t seq, const int64_t* positions,
                                     int64_t row, const Slots& keys, const Slots& values,
                                     float* mixed) const {
  const auto [least, most] = std::minmax_element(positions, positions + seq);
  const int64_t slots = *most + 1;
  const Panels<T> panels(kv_heads, lookback().first_slot(*least), slots, width, width);
  for (int64_t first_kv = 0; first_kv < kv_heads; first_kv += panels.heads) {
    const int64_t count = std::min(panels.heads, kv_heads - first_kv);
    parallel(count, [&](int64_t head) {
      for (int64_t slot = panels.first; slot < slots; ++slot) {
        const T* key_from = keys.at<T>(row, slot) + (first_kv + head) * width;
        const T* value_from = values.at<T>(row, slot) + (first_kv + head) * width;
        panels.put_key(head, slot, 0, width, key_from);
        panels.put_value(head, slot, 0, width, value_from);
      }
      panels.clear_edges(head);
    });
    panels.attend(queries, heads, kv_heads, first_kv, count, seq, positions, lookback(), mixed);
  }
}

}  // namespace moescope
