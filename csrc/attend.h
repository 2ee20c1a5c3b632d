// Softmax attention over slots of a cache: single queries walk over the slots, prompts meet panels.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "isa.h"
#include "numbers.h"

namespace moescope {

constexpr int64_t kSlotBlock = 64;  // slots at a time, so that all heads find them in the cache
constexpr int64_t kNoWindow = std::numeric_limits<int64_t>::max();

// How queries look back: a query sees the last `window` slots, its own included.
struct Lookback {
  float scale;  // of the attention logits
  int64_t window = kNoWindow;
  const float* sinks = nullptr;  // (heads,) logits that join the softmax and take no value

  int64_t first_slot(int64_t position) const { return std::max<int64_t>(0, position + 1 - window); }
};

// Numbers of successive slots: `width` of each, `stride` apart.
struct SlotRun {
  const float* data;
  int64_t stride, width;
};

// `kHeads` queries of one row that walk over its slots block by block, keeping a softmax that is
// mended as greater scores turn up (Milakov and Gimelshein 2018, algorithm 3).
class Bundle {
 public:
  static int64_t size(int64_t key_width, int64_t value_width) {
    return kHeads * (key_width + value_width + kSlotBlock);
  }
  // `memory` has `size` numbers, all zero.
  Bundle(float* memory, int64_t key_width, int64_t value_width);

  float* query(int64_t head) { return queries_ + head * key_width_; }
  // Let a logit join a query's softmax. Before the first visit.
  void add_sink(int64_t head, float logit, float scale);
  // Meet `count` slots, at most `kSlotBlock`. `more_keys` stand behind `keys`, if not null.
  void visit(const SlotRun& keys, const SlotRun* more_keys, const SlotRun& values, int64_t count,
             float scale);
  // The values of all slots visited, weighted, for one query.
  const float* finish(int64_t head);

 private:
  int64_t key_width_, value_width_;
  float *queries_, *mixed_, *scores_;  // (kHeads, key width | value width | kSlotBlock)
  float greatest_[kHeads], sums_[kHeads];
};

// Keys and values of slots [first, end) of one row, in panels for `multiply_floats`; its memory is
// the thread's, kept from call to call.
struct Panels {
  int64_t first;  // a multiple of 16
  int64_t padded_slots, key_width, value_width, padded_value;
  float* keys;    // (kv heads, slots / 16, key width, 16)
  float* values;  // (kv heads, value width / 16, slots, 16)

  // They begin with `first` or a little before it.
  Panels(int64_t kv_heads, int64_t first, int64_t end, int64_t key_width, int64_t value_width);

  float& key(int64_t head, int64_t slot, int64_t n) const {
    const int64_t at = slot - first;
    return keys[((head * padded_slots + at / kPanel * kPanel) * key_width) + n * kPanel +
                at % kPanel];
  }
  float& value(int64_t head, int64_t slot, int64_t n) const {
    return values[(head * padded_value + n / kPanel * kPanel) * padded_slots +
                  (slot - first) * kPanel + n % kPanel];
  }
  // queries (seq, heads, key width), each of which sees slots up to its position; out (seq, heads,
  // value width). Successive heads share a kv head.
  void attend(const float* queries, int64_t heads, int64_t kv_heads, int64_t seq,
              const int64_t* positions, const Lookback& back, float* out) const;
};

}  // namespace moescope
