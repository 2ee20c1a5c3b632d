// Softmax attention over slots of a cache: single queries walk over the slots, prompts meet panels.
#pragma once
#include <cstdint>

#include "isa.h"
#include "numbers.h"

namespace moescope {

constexpr int64_t kSlotBlock = 64;  // slots at a time, so that all heads find them in the cache

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

// Keys and values of all slots of one row, in panels for `multiply_floats`; its memory is the
// thread's, kept from call to call.
struct Panels {
  int64_t padded_slots, key_width, value_width, padded_value;
  float* keys;    // (kv heads, slots / 16, key width, 16)
  float* values;  // (kv heads, value width / 16, slots, 16)

  Panels(int64_t kv_heads, int64_t slots, int64_t key_width, int64_t value_width);

  float& key(int64_t head, int64_t slot, int64_t n) const {
    return keys[((head * padded_slots + slot / kPanel * kPanel) * key_width) + n * kPanel +
                slot % kPanel];
  }
  float& value(int64_t head, int64_t slot, int64_t n) const {
    return values[(head * padded_value + n / kPanel * kPanel) * padded_slots + slot * kPanel +
                  n % kPanel];
  }
  // queries (seq, heads, key width), each of which sees the slots up to its position; out (seq,
  // heads, value width). Successive heads share a kv head.
  void attend(const float* queries, int64_t heads, int64_t kv_heads, int64_t seq,
              const int64_t* positions, float scale, float* out) const;
};

}  // namespace moescope
