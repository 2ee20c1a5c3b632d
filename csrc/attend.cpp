#include "attend.h"

#include <cmath>

#include "pool.h"

namespace moescope {
namespace {

constexpr int64_t kPromptSlots = 128;  // that queries meet at a time
constexpr int64_t kFewQueries = 48, kManyQueries = 96, kManySlots = 1024;
constexpr int64_t kPanelBytes =
    8 << 20;  // of keys and values at once, if that is no less than a head

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Multiplies what was mixed by how much less it weighs now.
void weigh(float kept, float* mixed, int64_t width) {
  if (kept != 1) kernels().axpy(kept - 1, mixed, mixed, width);
}

}  // namespace

template <typename T>
int64_t Bundle<T>::size(const Widths& widths) {
  return attention_loops<T>(kernels()).heads *
         (round_up(widths.key, kQueryStep) + round_up(widths.more_key, kQueryStep) + widths.value +
          kSlotBlock);
}

template <typename T>
Bundle<T>::Bundle(float* memory, const Widths& widths, int64_t heads)
    : widths_(widths), heads_(heads) {
  const int64_t room = attention_loops<T>(kernels()).heads;
  queries_ = reinterpret_cast<T*>(memory);
  memory += room * round_up(widths.key, kQueryStep);
  more_queries_ = reinterpret_cast<T*>(memory);
  mixed_ = memory + room * round_up(widths.more_key, kQueryStep);
  scores_ = mixed_ + room * widths.value;
  std::fill_n(greatest_, kMostHeads, kNever);
  std::fill_n(sums_, kMostHeads, 0.0f);
}

template <typename T>
void Bundle<T>::set_query(int64_t head, const float* query) {
  const auto put = attention_loops<T>(kernels()).put_query;
  put(query, widths_.key, head, queries_, round_up(widths_.key, kQueryStep));
  if (widths_.more_key > 0)
    put(query + widths_.key, widths_.more_key, head, more_queries_,
        round_up(widths_.more_key, kQueryStep));
}

template <typename T>
void Bundle<T>::add_sink(int64_t head, float logit, float scale) {
  greatest_[head] = logit / scale;
  sums_[head] = 1;
}

template <typename T>
void Bundle<T>::visit(const SlotRun<T>& keys, const SlotRun<T>* more_keys, const SlotRun<T>& values,
                      int64_t count, float scale, int64_t bundle, int64_t walking) {
  const Kernels& k = kernels();
  const AttentionLoops<T>& loops = attention_loops<T>(k);
  std::fill_n(scores_, loops.heads * kSlotBlock, 0.0f);
  const int64_t share = walking >= 4 ? 1 : walking >= 2 ? 2 : 4;  // rows for every four
  const int64_t ahead = bundle * share * (kSlotBlock / 4);
  const auto add_dots = [&](const SlotRun<T>& slots, const T* queries) {
    const bool fetches = slots.next != nullptr && ahead < kSlotBlock;
    loops.dots(slots.data, slots.stride, count, queries, round_up(slots.width, kQueryStep),
               slots.width, fetches ? slots.next + ahead * slots.stride : slots.data,
               fetches ? static_cast<int>(share) : 0, scores_, kSlotBlock);
  };
  add_dots(keys, queries_);
  if (more_keys != nullptr) add_dots(*more_keys, more_queries_);
  for (int64_t h = 0; h < heads_; ++h) {
    float* p = scores_ + h * kSlotBlock;
    const float most = std::max(greatest_[h], k.greatest(p, count));
    const float kept = std::exp(scale * (greatest_[h] - most));
    weigh(kept, mixed_ + h * widths_.value, widths_.value);
    sums_[h] = sums_[h] * kept + k.exponentials(p, scale, most, count);
    greatest_[h] = most;
  }
  loops.mix(values.data, values.stride, count, scores_, kSlotBlock, widths_.value, mixed_,
            widths_.value);
}

Findings::Findings(std::vector<float>& memory, int64_t queries, int64_t runs, int64_t width)
    : runs_(runs), width_(width) {
  grow(memory, queries * runs * (width + 2));
  data_ = memory.data();
}

template <typename T>
void Findings::put(int64_t query, int64_t run, const Bundle<T>& found, int64_t head) {
  float* to = at(query, run);
  to[0] = found.greatest(head);
  to[1] = found.sum(head);
  std::copy_n(found.mixed(head), width_, to + 2);
}

void Findings::join(int64_t query, int64_t runs, float scale, float* out) const {
  float most = kNever, sum = 0;
  for (int64_t run = 0; run < runs; ++run) most = std::max(most, at(query, run)[0]);
  std::fill_n(out, width_, 0.0f);
  for (int64_t run = 0; run < runs; ++run) {
    const float* found = at(query, run);
    const float weight = std::exp(scale * (found[0] - most));
    sum += weight * found[1];
    kernels().axpy(weight, found + 2, out, width_);
  }
  for (int64_t n = 0; n < width_; ++n) out[n] /= sum;
}

template <typename T>
Panels<T>::Panels(int64_t all_heads, int64_t first, int64_t end, int64_t key_width,
                  int64_t value_width)
    : first(first / kPromptSlots * kPromptSlots),
      end(end),
      padded_slots(round_up(end - this->first, kPanel)),
      key_width(key_width),
      padded_key(round_up(key_width, kStep<T>)),
      value_width(value_width),
      padded_value(round_up(value_width, kPanel)) {
  static thread_local std::vector<T> held_keys, held_values;
  const int64_t bytes = padded_slots * (padded_key + padded_value) * sizeof(T);
  const int64_t least = std::min<int64_t>(threads(), all_heads);
  heads = std::clamp(kPanelBytes / bytes / least * least, least, all_heads);
  grow(held_keys, heads * padded_slots * padded_key);
  grow(held_values, heads * padded_slots * padded_value);
  keys = held_keys.data();
  values = held_values.data();
}

template <typename T>
void Panels<T>::put_key(int64_t head, int64_t slot, int64_t n, int64_t width, const T* from) const {
  const int64_t together = n % kStep<T> == 0 ? width / kStep<T> * kStep<T> : 0;
  T* to = &key(head, slot, n);
  for (int64_t k = 0; k < together; k += kStep<T>) std::copy_n(from + k, kStep<T>, to + k * kPanel);
  for (int64_t k = together; k < width; ++k) key(head, slot, n + k) = from[k];
}

template <typename T>
void Panels<T>::put_value(int64_t head, int64_t slot, int64_t n, int64_t width,
                          const T* from) const {
  for (const int64_t end = n + width; n < end;) {
    const int64_t run = std::min(kPanel - n % kPanel, end - n);
    T* to = &value(head, slot, n);
    for (int64_t i = 0; i < run; ++i) to[i * kStep<T>] = from[i];
    n += run, from += run;
  }
}

template <typename T>
void Panels<T>::clear_edges(int64_t head) const {
  for (int64_t n = key_width; n < padded_key; ++n)
    for (int64_t slot = first; slot < end; ++slot) key(head, slot, n) = {};
  for (int64_t slot = end; slot < first + round_up(end - first, kStep<T>); ++slot)
    for (int64_t n = 0; n < padded_value; ++n) value(head, slot, n) = {};
}

template <typename T>
void Panels<T>::attend(const float* queries, int64_t heads, int64_t kv_heads, int64_t first_kv,
                       int64_t count, int64_t seq, const int64_t* positions, const Lookback& back,
                       float* out) const {
  const int64_t group = heads / kv_heads, attended = count * group;
  const int64_t block = end - first > kManySlots ? kManyQueries : kFewQueries;
  const int64_t blocks = (seq + block - 1) / block;
  parallel(attended * blocks, [&](int64_t task) {
    static thread_local std::vector<float> memory;
    static thread_local std::vector<T> rounded;
    const Kernels& k = kernels();
    const AttentionLoops<T>& loops = attention_loops<T>(k);
    const int64_t kv_head = task % attended / group;  // of the panels
    const int64_t head = first_kv * group + task % attended;
    const int64_t start = (blocks - 1 - task / attended) * block;  // longest first
    const int rows = static_cast<int>(std::min(block, seq - start));
    const auto [least, most] = std::minmax_element(positions + start, positions + start + rows);
    const int64_t begin = back.first_slot(*least) / kPromptSlots * kPromptSlots;
    grow(memory, rows * (kPromptSlots + padded_value + 2));
    grow(rounded, rows * (padded_key + kPromptSlots));
    float* scores = memory.data();                  // (rows, kPromptSlots)
    float* mixed = scores + rows * kPromptSlots;    // (rows, padded_value)
    float* greatest = mixed + rows * padded_value;  // (rows,)
    float* sums = greatest + rows;                  // (rows,)
    T* asked = rounded.data();                      // (rows, padded_key)
    T* weights = asked + rows * padded_key;         // (rows, kPromptSlots)
    std::fill_n(mixed, rows * padded_value, 0.0f);
    std::fill_n(greatest, rows, back.sinks ? back.sinks[head] / back.scale : kNever);
    std::fill_n(sums, rows, back.sinks ? 1.0f : 0.0f);
    for (int q = 0; q < rows; ++q) {
      T* to = asked + q * padded_key;
      loops.store(queries + ((start + q) * heads + head) * key_width, key_width, to);
      std::fill(to + key_width, to + padded_key, T{});
    }
    for (int64_t slot = begin; slot <= *most; slot += kPromptSlots) {
      const int64_t met = std::min(kPromptSlots, *most + 1 - slot);
      const int64_t depth = round_up(met, kStep<T>);
      loops.multiply(asked, padded_key, rows, &key(kv_head, slot, 0), kPanel * padded_key,
                     padded_key, static_cast<int>((met + kPanel - 1) / kPanel), false, scores,
                     kPromptSlots);
      for (int q = 0; q < rows; ++q) {
        const int64_t position = positions[start + q];
        const int64_t unseen = std::clamp<int64_t>(back.first_slot(position) - slot, 0, met);
        const int64_t seen = std::clamp<int64_t>(position + 1 - slot, unseen, met);
        float* row = scores + q * kPromptSlots;
        if (unseen < seen) {
          const float now = std::max(greatest[q], k.greatest(row + unseen, seen - unseen));
          const float kept = std::exp(back.scale * (greatest[q] - now));
          weigh(kept, mixed + q * padded_value, padded_value);
          sums[q] = sums[q] * kept + k.exponentials(row + unseen, back.scale, now, seen - unseen);
          greatest[q] = now;
        }
        std::fill(row, row + unseen, 0.0f);
        std::fill(row + seen, row + depth, 0.0f);
        loops.store(row, depth, weights + q * kPromptSlots);
      }
      loops.multiply(weights, kPromptSlots, rows, &value(kv_head, slot, 0), kPanel * padded_slots,
                     depth, static_cast<int>(padded_value / kPanel), true, mixed, padded_value);
    }
    for (int q = 0; q < rows; ++q) {
      const float inverse = 1 / sums[q];
      float* to = out + ((start + q) * heads + head) * value_width;
      for (int64_t n = 0; n < value_width; ++n) to[n] = mixed[q * padded_value + n] * inverse;
    }
  });
}

template class Bundle<float>;
template class Bundle<Bf16>;
template void Findings::put(int64_t, int64_t, const Bundle<float>&, int64_t);
template void Findings::put(int64_t, int64_t, const Bundle<Bf16>&, int64_t);
template struct Panels<float>;
template struct Panels<Bf16>;

}  // namespace moescope
