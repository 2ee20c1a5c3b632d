#include <algorithm>

#include "ops.h"
#include "pool.h"

namespace moescope {
namespace {

constexpr int64_t kSlotBlock = 64;  // slots at a time, so that all heads find them in the cache
constexpr int64_t kQueryBlock = 48;
constexpr int64_t kScores = 24576;  // of a block of queries, so that they stay in the cache

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

void grow(std::vector<float>& held, int64_t size) {
  if (static_cast<int64_t>(held.size()) < size) held.resize(size);
}

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

void AbsorbedAttention::forward(const Queries& queries, const Slots& latents, const Slots& k_rope,
                                const int64_t* lengths, int64_t batch, float* out) const {
  const int64_t heads = up_key->matrices(), value = up_value->outputs();
  const int64_t rank = latents.width, rope = k_rope.width;
  const int64_t bundles = (heads + kHeads - 1) / kHeads;
  parallel(batch * bundles, [&](int64_t task) {
    static thread_local QuantizedRows rounded;
    static thread_local std::vector<float> memory;
    const int64_t row = task / bundles, first = task % bundles * kHeads;
    const int64_t count = std::min<int64_t>(kHeads, heads - first), slots = lengths[row];
    memory.assign(kHeads * (2 * rank + rope + slots), 0.0f);  // heads beyond the last stay zero
    float* q_latent = memory.data();            // (kHeads, rank)
    float* mixed = q_latent + kHeads * rank;    // (kHeads, rank)
    float* q_rotated = mixed + kHeads * rank;   // (kHeads, rope)
    float* scores = q_rotated + kHeads * rope;  // (kHeads, slots)
    for (int64_t h = 0; h < count; ++h) {
      const int64_t head = row * heads + first + h;
      multiply_vector(*up_key, first + h, queries.nope + head * queries.nope_stride, rounded,
                      q_latent + h * rank);
      std::copy_n(queries.rope + head * queries.rope_stride, rope, q_rotated + h * rope);
    }
    for (int64_t slot = 0; slot < slots; slot += kSlotBlock) {
      const int64_t block = std::min(kSlotBlock, slots - slot);
      kernels().dots(latents.at(row, slot), latents.slot_stride, block, q_latent, rank, rank,
                     scores + slot, slots);
      kernels().dots(k_rope.at(row, slot), k_rope.slot_stride, block, q_rotated, rope, rope,
                     scores + slot, slots);
    }
    for (int64_t h = 0; h < kHeads; ++h) kernels().softmax(scores + h * slots, scale, slots);
    for (int64_t slot = 0; slot < slots; slot += kSlotBlock)
      kernels().mix(latents.at(row, slot), latents.slot_stride, std::min(kSlotBlock, slots - slot),
                    scores + slot, slots, rank, mixed, rank);
    for (int64_t h = 0; h < count; ++h)
      multiply_vector(*up_value, first + h, mixed + h * rank, rounded,
                      out + (row * heads + first + h) * value);
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
