#include <algorithm>
#include <cmath>
#include <limits>

#include "numbers.h"
#include "ops.h"
#include "pool.h"

namespace moescope {
namespace {

constexpr int64_t kSlotBlock = 64;  // slots at a time, so that all heads find them in the cache
constexpr int64_t kQueryBlock = 48;
constexpr int64_t kScores = 24576;  // of a block of queries, so that they stay in the cache

// One matrix times one vector.
void multiply_vector(const Weights& weights, int64_t matrix, const float* x, QuantizedRows& rounded,
                     float* out) {
  rounded.resize(weights, 1);
  rounded.set_row(0, x);
  alignas(64) float product[kTile];
  for (int64_t tile = 0; tile < weights.tiles(); ++tile) {
    weights.multiply(matrix, tile, rounded.view(), nullptr, 1, product);
    const int64_t start = tile * kTile;
    std::copy_n(product, std::min<int64_t>(kTile, weights.outputs() - start), out + start);
  }
}

}  // namespace

namespace {

// `kHeads` queries of one row that walk over its slots block by block, keeping a softmax that is
// mended as greater scores turn up (Milakov and Gimelshein 2018, algorithm 3).
struct Bundle {
  float *q_latent, *q_rope, *mixed, *scores;  // (kHeads, rank | rope | rank | kSlotBlock)
  float greatest[kHeads], sums[kHeads];

  static int64_t size(int64_t rank, int64_t rope) { return kHeads * (2 * rank + rope + kSlotBlock); }

  Bundle(float* memory, int64_t rank, int64_t rope)
      : q_latent(memory),
        q_rope(q_latent + kHeads * rank),
        mixed(q_rope + kHeads * rope),
        scores(mixed + kHeads * rank) {
    std::fill_n(greatest, kHeads, -std::numeric_limits<float>::infinity());
    std::fill_n(sums, kHeads, 0.0f);
  }

  void visit(const Slots& latents, const Slots& k_rope, int64_t row, int64_t slot, int64_t count,
             float scale) {
    const int64_t rank = latents.width, rope = k_rope.width;
    std::fill_n(scores, kHeads * kSlotBlock, 0.0f);
    kernels().dots(latents.at(row, slot), latents.slot_stride, count, q_latent, rank, rank, scores,
                   kSlotBlock);
    kernels().dots(k_rope.at(row, slot), k_rope.slot_stride, count, q_rope, rope, rope, scores,
                   kSlotBlock);
    for (int h = 0; h < kHeads; ++h) {
      float* p = scores + h * kSlotBlock;
      const float most = std::max(greatest[h], largest(p, count));
      const float kept = std::exp(scale * (greatest[h] - most));
      if (kept != 1) kernels().axpy(kept - 1, mixed + h * rank, mixed + h * rank, rank);
      sums[h] = sums[h] * kept + kernels().exponentials(p, scale, most, count);
      greatest[h] = most;
    }
    kernels().mix(latents.at(row, slot), latents.slot_stride, count, scores, kSlotBlock, rank, mixed,
                  rank);
  }
};

}  // namespace

void AbsorbedAttention::forward(const Queries& queries, const Slots& latents, const Slots& k_rope,
                                const int64_t* lengths, int64_t batch, float* out) const {
  const int64_t heads = up_key->matrices(), value = up_value->outputs();
  const int64_t rank = latents.width, rope = k_rope.width;
  // A task takes as many heads as leave every thread one: they share what they read of the cache.
  const int64_t bundles = (heads + kHeads - 1) / kHeads;
  const int64_t at_once = std::clamp<int64_t>(batch * bundles / threads(), 1, bundles);
  const int64_t parts = (bundles + at_once - 1) / at_once;
  parallel(batch * parts, [&](int64_t task) {
    static thread_local QuantizedRows rounded;
    static thread_local std::vector<float> memory;
    static thread_local std::vector<Bundle> walking;
    const int64_t row = task / parts, first = task % parts * at_once * kHeads;
    const int64_t end = std::min(first + at_once * kHeads, heads);
    const int64_t size = Bundle::size(rank, rope), count = (end - first + kHeads - 1) / kHeads;
    memory.assign(count * size, 0.0f);  // heads beyond the last stay zero
    walking.clear();
    for (int64_t b = 0; b < count; ++b) walking.emplace_back(memory.data() + b * size, rank, rope);
    for (int64_t h = first; h < end; ++h) {
      const Bundle& bundle = walking[(h - first) / kHeads];
      const int64_t at = (h - first) % kHeads, head = row * heads + h;
      multiply_vector(*up_key, h, queries.nope + head * queries.nope_stride, rounded,
                      bundle.q_latent + at * rank);
      std::copy_n(queries.rope + head * queries.rope_stride, rope, bundle.q_rope + at * rope);
    }
    for (int64_t slot = 0; slot < lengths[row]; slot += kSlotBlock)
      for (Bundle& bundle : walking)
        bundle.visit(latents, k_rope, row, slot, std::min(kSlotBlock, lengths[row] - slot), scale);
    for (int64_t h = first; h < end; ++h) {
      const Bundle& bundle = walking[(h - first) / kHeads];
      const int64_t at = (h - first) % kHeads;
      float* mixed = bundle.mixed + at * rank;
      for (int64_t i = 0; i < rank; ++i) mixed[i] /= bundle.sums[at];
      multiply_vector(*up_value, h, mixed, rounded, out + (row * heads + h) * value);
    }
  });
  count_weight_bytes(heads * (up_key->matrix_bytes() + up_value->matrix_bytes()));
}

void ExpandedAttention::forward(const float* queries, int64_t seq, const int64_t* positions,
                                int64_t row, const Slots& latents, const Slots& k_rope,
                                float* out) const {
  static thread_local QuantizedRows caller_rounded;
  static thread_local std::vector<float> caller_keys, caller_values;
  QuantizedRows& rounded = caller_rounded;  // the caller's, seen by all threads
  const int64_t heads = expand->matrices(), rope = k_rope.width, width = nope + rope;
  const int64_t value = expand->outputs() - nope, padded_value = round_up(value, kPanel);
  const int64_t slots = *std::max_element(positions, positions + seq) + 1;
  const int64_t padded_slots = round_up(slots, kPanel);
  grow(caller_keys, heads * padded_slots * width);
  grow(caller_values, heads * padded_slots * padded_value);
  float* keys = caller_keys.data();      // (heads, slots / 16, nope + rope, 16)
  float* values = caller_values.data();  // (heads, v_head_dim / 16, slots, 16)

  rounded.resize(*expand, slots);
  parallel_rows(slots, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) rounded.set_row(slot, latents.at(row, slot));
  });
  const int64_t slot_blocks = (slots + kRowBlock - 1) / kRowBlock;
  parallel(heads * slot_blocks, [&](int64_t task) {
    const int64_t head = task / slot_blocks, first = task % slot_blocks * kRowBlock;
    const int64_t count = std::min<int64_t>(kRowBlock, slots - first);
    float* head_keys = keys + (head * padded_slots + first) * width;
    float* head_values = values + head * padded_slots * padded_value + first * kPanel;
    int32_t rows[kRowBlock];
    for (int64_t s = 0; s < count; ++s) rows[s] = static_cast<int32_t>(first + s);
    alignas(64) float product[kRowBlock * kTile];
    for (int64_t tile = 0; tile < expand->tiles(); ++tile) {
      expand->multiply(head, tile, rounded.view(), rows, static_cast<int>(count), product);
      const int64_t start = tile * kTile, end = std::min(start + kTile, nope + value);
      for (int64_t n = start; n < std::min(end, nope); ++n)
        for (int64_t s = 0; s < count; ++s)
          head_keys[(s / kPanel * width + n) * kPanel + s % kPanel] = product[s * kTile + n - start];
      for (int64_t s = 0; s < count; ++s)
        for (int64_t n = std::max(start, nope); n < end; ++n)
          head_values[(n - nope) / kPanel * padded_slots * kPanel + s * kPanel +
                      (n - nope) % kPanel] = product[s * kTile + n - start];
    }
    for (int64_t s = 0; s < count; ++s) {
      const float* rotated = k_rope.at(row, first + s);
      for (int64_t r = 0; r < rope; ++r)
        head_keys[(s / kPanel * width + nope + r) * kPanel + s % kPanel] = rotated[r];
    }
  });
  count_weight_bytes(heads * expand->matrix_bytes());

  const int64_t block = std::max<int64_t>(6, std::min(kQueryBlock, kScores / padded_slots / 6 * 6));
  const int64_t blocks = (seq + block - 1) / block;
  parallel(heads * blocks, [&](int64_t task) {
    static thread_local std::vector<float> memory;
    const int64_t head = task % heads, start = (blocks - 1 - task / heads) * block;  // longest first
    const int count = static_cast<int>(std::min(block, seq - start));
    const int64_t visible = *std::max_element(positions + start, positions + start + count) + 1;
    const int64_t stride = round_up(visible, kPanel);
    grow(memory, block * (stride + padded_value));
    float* scores = memory.data();          // (count, stride)
    float* mixed = scores + block * stride;  // (count, padded_value)
    const float* query = queries + (start * heads + head) * width;
    kernels().multiply_floats(query, heads * width, count, keys + head * padded_slots * width,
                              kPanel * width, width, static_cast<int>(stride / kPanel), scores,
                              stride);
    for (int q = 0; q < count; ++q) {
      const int64_t seen = positions[start + q] + 1;
      kernels().softmax(scores + q * stride, scale, seen);
      std::fill(scores + q * stride + seen, scores + q * stride + visible, 0.0f);
    }
    kernels().multiply_floats(scores, stride, count, values + head * padded_slots * padded_value,
                              kPanel * padded_slots, visible,
                              static_cast<int>(padded_value / kPanel), mixed, padded_value);
    for (int q = 0; q < count; ++q)
      std::copy_n(mixed + q * padded_value, value, out + ((start + q) * heads + head) * value);
  });
}

}  // namespace moescope
