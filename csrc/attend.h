// Softmax attention over slots of a cache: single queries walk over the slots, prompts meet panels.
// Both go block by block, keeping a softmax that is mended as greater scores turn up (Milakov and
// Gimelshein 2018, algorithm 3). Blocks begin at multiples of their size, whoever else is there, so
// that a query's numbers depend on nothing but its slots. T is what the cache holds (isa.h).
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "isa.h"
#include "numbers.h"

namespace moescope {

constexpr int64_t kNoWindow = std::numeric_limits<int64_t>::max();

// How queries look back: a query sees the last `window` slots, its own included.
struct Lookback {
  float scale;  // of the attention logits
  int64_t window = kNoWindow;
  const float* sinks = nullptr;  // (heads,) logits that join the softmax and take no value

  int64_t first_slot(int64_t position) const { return std::max<int64_t>(0, position + 1 - window); }
};

// Slots that one walk visits; the next ones are another's, whose findings join its own.
constexpr int64_t kRun = 1024;

inline int64_t runs_of(int64_t slots) { return (slots + kRun - 1) / kRun; }

// Numbers of successive slots: `width` of each, `stride` apart; and where the walk goes on, if it does.
template <typename T>
struct SlotRun {
  const T* data;
  int64_t stride, width;
  const T* next = nullptr;
};

// Queries of one row that walk over its slots together, at most `AttentionLoops::heads`.
template <typename T>
class Bundle {
 public:
  // Keys have two parts, of which the second may be empty.
  struct Widths {
    int64_t key, more_key, value;
  };
  // The numbers of memory that a bundle takes.
  static int64_t size(const Widths& widths);
  // `memory` is all zero.
  Bundle(float* memory, const Widths& widths, int64_t heads);

  // query (both parts of a key,)
  void set_query(int64_t head, const float* query);
  // Let a logit join a query's softmax. Before the first visit.
  void add_sink(int64_t head, float logit, float scale);
  // Meet `count` slots, at most `kSlotBlock`. `more_keys` is null where the second part is empty. Of the
  // next keys the share of one of `walking` bundles is fetched meanwhile.
  void visit(const SlotRun<T>& keys, const SlotRun<T>* more_keys, const SlotRun<T>& values,
             int64_t count, float scale, int64_t bundle, int64_t walking);

  // What a query found: its greatest score, its weights' sum, and the values, weighted.
  float greatest(int64_t head) const { return greatest_[head]; }
  float sum(int64_t head) const { return sums_[head]; }
  const float* mixed(int64_t head) const { return mixed_ + head * widths_.value; }

 private:
  Widths widths_;
  int64_t heads_;
  T *queries_, *more_queries_;  // as `put_query` lays them
  float *mixed_, *scores_;      // (heads, value width | kSlotBlock)
  float greatest_[kMostHeads], sums_[kMostHeads];
};

// What queries found in each run of their slots.
class Findings {
 public:
  Findings(std::vector<float>& memory, int64_t queries, int64_t runs, int64_t width);

  template <typename T>
  void put(int64_t query, int64_t run, const Bundle<T>& found, int64_t head);
  // out (width,) = the values of the query's first `runs` runs, weighted.
  void join(int64_t query, int64_t runs, float scale, float* out) const;

 private:
  float* at(int64_t query, int64_t run) const {
    return data_ + (query * runs_ + run) * (width_ + 2);
  }
  float* data_;  // (queries, runs, greatest | sum | width)
  int64_t runs_, width_;
};

// Keys and values of slots [first, end) of one row and of some of its heads, in panels for
// `AttentionLoops::multiply`; its memory is the thread's, kept from call to call.
template <typename T>
struct Panels {
  int64_t first;  // where a block begins
  int64_t end, padded_slots, key_width, padded_key, value_width, padded_value;
  int64_t heads;  // for which there is room
  T* keys;        // (heads, slots / 16, key width / kStep, 16, kStep)
  T* values;      // (heads, value width / 16, slots / kStep, 16, kStep)

  // They begin with `first` or a little before it. There is room for as many of the heads as leave
  // what they hold in the last-level cache.
  Panels(int64_t all_heads, int64_t first, int64_t end, int64_t key_width, int64_t value_width);

  T& key(int64_t head, int64_t slot, int64_t n) const {
    const int64_t at = slot - first;
    return keys[(head * padded_slots + at / kPanel * kPanel) * padded_key +
                (n / kStep<T> * kPanel + at % kPanel) * kStep<T> + n % kStep<T>];
  }
  T& value(int64_t head, int64_t slot, int64_t n) const {
    const int64_t at = slot - first;
    return values[(head * padded_value + n / kPanel * kPanel) * padded_slots +
                  (at / kStep<T> * kPanel + n % kPanel) * kStep<T> + at % kStep<T>];
  }
  // Put numbers [n, n + width) of a slot's key, or of its value.
  void put_key(int64_t head, int64_t slot, int64_t n, int64_t width, const T* from) const;
  void put_value(int64_t head, int64_t slot, int64_t n, int64_t width, const T* from) const;
  // Make a head's numbers zero that stand beside its keys and values and are multiplied with them.
  void clear_edges(int64_t head) const;
  // queries (seq, heads, key width), each of which sees slots up to its position; out (seq, heads,
  // value width). Of the heads, those are attended that share kv heads [first_kv, first_kv + count),
  // whose keys and values the panels hold; successive heads share a kv head.
  void attend(const float* queries, int64_t heads, int64_t kv_heads, int64_t first_kv,
              int64_t count, int64_t seq, const int64_t* positions, const Lookback& back,
              float* out) const;
};

}  // namespace moescope
