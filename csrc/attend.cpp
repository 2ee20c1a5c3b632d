#include "attend.h"

#include <cmath>

#include "pool.h"

namespace moescope {
namespace {

constexpr int64_t kQueryBlock = 48;
constexpr int64_t kScores = 24576;  // of a block of queries, so that they stay in the cache

}  // namespace

Bundle::Bundle(float* memory, int64_t key_width, int64_t value_width)
    : key_width_(key_width),
      value_width_(value_width),
      queries_(memory),
      mixed_(queries_ + kHeads * key_width),
      scores_(mixed_ + kHeads * value_width) {
  std::fill_n(greatest_, kHeads, -std::numeric_limits<float>::infinity());
  std::fill_n(sums_, kHeads, 0.0f);
}

void Bundle::add_sink(int64_t head, float logit, float scale) {
  greatest_[head] = logit / scale;
  sums_[head] = 1;
}

void Bundle::visit(const SlotRun& keys, const SlotRun* more_keys, const SlotRun& values,
                   int64_t count, float scale) {
  const Kernels& k = kernels();
  std::fill_n(scores_, kHeads * kSlotBlock, 0.0f);
  k.dots(keys.data, keys.stride, count, queries_, key_width_, keys.width, scores_, kSlotBlock);
  if (more_keys != nullptr)
    k.dots(more_keys->data, more_keys->stride, count, queries_ + keys.width, key_width_,
           more_keys->width, scores_, kSlotBlock);
  for (int h = 0; h < kHeads; ++h) {
    float *p = scores_ + h * kSlotBlock, *mixed = mixed_ + h * value_width_;
    const float most = std::max(greatest_[h], largest(p, count));
    const float kept = std::exp(scale * (greatest_[h] - most));
    if (kept != 1) k.axpy(kept - 1, mixed, mixed, value_width_);
    sums_[h] = sums_[h] * kept + k.exponentials(p, scale, most, count);
    greatest_[h] = most;
  }
  k.mix(values.data, values.stride, count, scores_, kSlotBlock, value_width_, mixed_, value_width_);
}

const float* Bundle::finish(int64_t head) {
  float* mixed = mixed_ + head * value_width_;
  for (int64_t i = 0; i < value_width_; ++i) mixed[i] /= sums_[head];
  return mixed;
}

Panels::Panels(int64_t kv_heads, int64_t first, int64_t end, int64_t key_width, int64_t value_width)
    : first(first / kPanel * kPanel),
      padded_slots(round_up(end - this->first, kPanel)),
      key_width(key_width),
      value_width(value_width),
      padded_value(round_up(value_width, kPanel)) {
  static thread_local std::vector<float> held_keys, held_values;
  grow(held_keys, kv_heads * padded_slots * key_width);
  grow(held_values, kv_heads * padded_slots * padded_value);
  keys = held_keys.data();
  values = held_values.data();
}

void Panels::attend(const float* queries, int64_t heads, int64_t kv_heads, int64_t seq,
                    const int64_t* positions, const Lookback& back, float* out) const {
  const int64_t met =
      std::min(padded_slots, back.window < padded_slots ? back.window + kQueryBlock : padded_slots);
  const int64_t block = std::max<int64_t>(6, std::min(kQueryBlock, kScores / met / 6 * 6));
  const int64_t blocks = (seq + block - 1) / block;
  parallel(heads * blocks, [&](int64_t task) {
    static thread_local std::vector<float> memory;
    const int64_t head = task % heads;
    const int64_t start = (blocks - 1 - task / heads) * block;  // longest first
    const int64_t kv_head = head / (heads / kv_heads);
    const int count = static_cast<int>(std::min(block, seq - start));
    const float sink =
        back.sinks == nullptr ? -std::numeric_limits<float>::infinity() : back.sinks[head];
    const auto [least, most] = std::minmax_element(positions + start, positions + start + count);
    const int64_t begin = back.first_slot(*least) / kPanel * kPanel;  // met by some query
    const int64_t visible = *most + 1 - begin;
    const int64_t stride = round_up(visible, kPanel);
    grow(memory, block * (stride + padded_value + 1));
    float* scores = memory.data();               // (count, stride)
    float* mixed = scores + block * stride;      // (count, padded_value)
    float* sums = mixed + block * padded_value;  // (count,)
    kernels().multiply_floats(queries + (start * heads + head) * key_width, heads * key_width,
                              count, &key(kv_head, begin, 0), kPanel * key_width, key_width,
                              static_cast<int>(stride / kPanel), scores, stride);
    for (int q = 0; q < count; ++q) {
      const int64_t position = positions[start + q];
      const int64_t unseen = back.first_slot(position) - begin, seen = position + 1 - begin;
      float* row = scores + q * stride;
      const float greatest = std::max(largest(row + unseen, seen - unseen), sink / back.scale);
      sums[q] = kernels().exponentials(row + unseen, back.scale, greatest, seen - unseen) +
                std::exp(sink - back.scale * greatest);
      std::fill(row, row + unseen, 0.0f);
      std::fill(row + seen, row + visible, 0.0f);
    }
    kernels().multiply_floats(scores, stride, count, &value(kv_head, begin, 0),
                              kPanel * padded_slots, visible,
                              static_cast<int>(padded_value / kPanel), mixed, padded_value);
    for (int q = 0; q < count; ++q) {
      const float inverse = 1 / sums[q];
      float* to = out + ((start + q) * heads + head) * value_width;
      for (int64_t n = 0; n < value_width; ++n) to[n] = mixed[q * padded_value + n] * inverse;
    }
  });
}

}  // namespace moescope
