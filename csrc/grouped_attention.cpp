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

void GroupedAttention::forward(float* x, const Tokens& tokens, const Slots& keys,
                               const Slots& values) const {
  static thread_local QuantizedRows caller_rounded;
  static thread_local std::vector<float> caller_queries, caller_keys, caller_values, caller_mixed;
  QuantizedRows& rounded = caller_rounded;  // the caller's, seen by all threads
  const int64_t count = tokens.count(), kv_width = kv_heads * width;
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
  multiply_all({query.to(queries), key.to(new_keys), value.to(new_values)}, rounded, count);
  parallel_rows(count, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> unrotated;
    grow(unrotated, rope);
    for (int64_t token = first; token < last; ++token) {
      const float* cosine = tokens.cosine + token * (rope / 2);
      const float* sine = tokens.sine + token * (rope / 2);
      float* token_queries = queries + token * heads * width;
      float* token_keys = new_keys + token * kv_width;
      float* token_values = new_values + token * kv_width;
      normalise(query_norm, token_queries, heads * width);
      normalise(key_norm, token_keys, kv_width);
      if (std::isfinite(clip)) {
        clamp(token_queries, heads * width, clip);
        clamp(token_keys, kv_width, clip);
        clamp(token_values, kv_width, clip);
      }
      for (int64_t head = 0; head < heads; ++head) {
        float* rotated = token_queries + head * width;
        std::copy_n(rotated, rope, unrotated.data());
        rotate(unrotated.data(), cosine, sine, rope, interleave, rotated);
      }
      const int64_t row = tokens.row_of[token], slot = tokens.positions[token];
      std::copy_n(token_keys, kv_width, keys.at(row, slot));
      for (int64_t head = 0; head < kv_heads; ++head)
        rotate(token_keys + head * width, cosine, sine, rope, interleave,
               keys.at(row, slot) + head * width);
      std::copy_n(token_values, kv_width, values.at(row, slot));
    }
  });

  attend_singly(queries, tokens, keys, values, mixed);
  for (int64_t row = tokens.singles; row < tokens.rows; ++row) {
    const int64_t first = tokens.starts[row], seq = tokens.starts[row + 1] - first;
    attend_prompt(queries + first * heads * width, seq, tokens.positions + first, row, keys, values,
                  mixed + first * heads * width);
  }
  rounded.resize(*output.weights, count);
  parallel_rows(count, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token)
      rounded.set_row(token, mixed + token * heads * width);
  });
  multiply_all({output.add_to(x, residual_multiplier)}, rounded, count);
}

void GroupedAttention::attend_singly(const float* queries, const Tokens& tokens, const Slots& keys,
                                     const Slots& values, float* mixed) const {
  const int64_t group = heads / kv_heads, bundles = (group + kHeads - 1) / kHeads;
  parallel(tokens.singles * kv_heads * bundles, [&](int64_t task) {
    static thread_local std::vector<float> memory;
    const int64_t row = task / (kv_heads * bundles), kv_head = task / bundles % kv_heads;
    const int64_t first = kv_head * group + task % bundles * kHeads;
    const int64_t count = std::min<int64_t>(kHeads, (kv_head + 1) * group - first);
    memory.assign(Bundle::size(width, width), 0.0f);
    Bundle bundle(memory.data(), width, width);
    for (int64_t h = 0; h < count; ++h) {
      std::copy_n(queries + (row * heads + first + h) * width, width, bundle.query(h));
      if (!sinks.empty()) bundle.add_sink(h, sinks[first + h], scale);
    }
    const int64_t slots = tokens.positions[row] + 1;
    int64_t met;
    for (int64_t slot = lookback().first_slot(slots - 1); slot < slots; slot += met) {
      met = std::min({kSlotBlock, slots - slot, keys.together(slot)});
      bundle.visit({keys.at(row, slot) + kv_head * width, keys.slot_stride, width}, nullptr,
                   {values.at(row, slot) + kv_head * width, values.slot_stride, width}, met, scale);
    }
    for (int64_t h = 0; h < count; ++h)
      std::copy_n(bundle.finish(h), width, mixed + (row * heads + first + h) * width);
  });
}

void GroupedAttention::attend_prompt(const float* queries, int64_t seq, const int64_t* positions,
                                     int64_t row, const Slots& keys, const Slots& values,
                                     float* mixed) const {
  const auto [least, most] = std::minmax_element(positions, positions + seq);
  const int64_t slots = *most + 1;
  const Panels panels(kv_heads, lookback().first_slot(*least), slots, width, width);
  parallel(kv_heads, [&](int64_t head) {
    for (int64_t slot = panels.first; slot < slots; ++slot) {
      const float* key_from = keys.at(row, slot) + head * width;
      const float* value_from = values.at(row, slot) + head * width;
      for (int64_t n = 0; n < width; ++n) panels.key(head, slot, n) = key_from[n];
      for (int64_t n = 0; n < width; ++n) panels.value(head, slot, n) = value_from[n];
    }
  });
  panels.attend(queries, heads, kv_heads, seq, positions, lookback(), mixed);
}

}  // namespace moescope
