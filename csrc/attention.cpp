#include <algorithm>

#include "ops.h"
#include "pool.h"

namespace moescope {
namespace {

constexpr int64_t kSlotBlock = 64;  // slots at a time, so that all heads find them in the cache

// One matrix times one vector.
void multiply_vector(const Weights& weights, int64_t matrix, const float* x, QuantizedRows& rounded,
                     float* out) {
  rounded.resize(weights, 1);
  rounded.set(0, 0, x, weights.columns(), weights.padded_columns());
  alignas(64) float product[kTile];
  for (int64_t tile = 0; tile < weights.tiles(); ++tile) {
    weights.multiply(matrix, tile, rounded.view(), nullptr, 1, product);
    const int64_t start = tile * kTile;
    std::copy_n(product, std::min<int64_t>(kTile, weights.outputs() - start), out + start);
  }
}

}  // namespace

void AbsorbedAttention::forward(const float* q_nope, const float* q_rope, const Cache& latents,
                                const Cache& k_rope, const int64_t* lengths, int64_t batch,
                                float* out) const {
  const int64_t heads = up_key->matrices(), nope = up_key->columns();
  const int64_t rank = latents.width, rope = k_rope.width, value = up_value->outputs();
  const int64_t bundles = (heads + kHeads - 1) / kHeads;
  parallel(batch * bundles, [&](int64_t task) {
    static thread_local QuantizedRows rounded;
    static thread_local std::vector<float> memory;
    const int64_t row = task / bundles, first = task % bundles * kHeads;
    const int64_t count = std::min<int64_t>(kHeads, heads - first), slots = lengths[row];
    memory.assign(kHeads * (2 * rank + rope + slots), 0.0f);  // heads beyond the last stay zero
    float* q_latent = memory.data();          // (kHeads, rank)
    float* mixed = q_latent + kHeads * rank;  // (kHeads, rank)
    float* q_rotated = mixed + kHeads * rank;   // (kHeads, rope)
    float* scores = q_rotated + kHeads * rope;  // (kHeads, slots)
    for (int64_t h = 0; h < count; ++h) {
      const int64_t head = row * heads + first + h;
      multiply_vector(*up_key, first + h, q_nope + head * nope, rounded, q_latent + h * rank);
      std::copy_n(q_rope + head * rope, rope, q_rotated + h * rope);
    }
    const float* past = latents.data + row * latents.row_stride;
    const float* keys = k_rope.data + row * k_rope.row_stride;
    for (int64_t slot = 0; slot < slots; slot += kSlotBlock) {
      const int64_t block = std::min(kSlotBlock, slots - slot);
      kernels().dots(past + slot * latents.slot_stride, latents.slot_stride, block, q_latent, rank,
                     rank, scores + slot, slots);
      kernels().dots(keys + slot * k_rope.slot_stride, k_rope.slot_stride, block, q_rotated, rope,
                     rope, scores + slot, slots);
    }
    for (int64_t h = 0; h < kHeads; ++h) kernels().softmax(scores + h * slots, scale, slots);
    for (int64_t slot = 0; slot < slots; slot += kSlotBlock)
      kernels().mix(past + slot * latents.slot_stride, latents.slot_stride,
                    std::min(kSlotBlock, slots - slot), scores + slot, slots, rank, mixed, rank);
    for (int64_t h = 0; h < count; ++h)
      multiply_vector(*up_value, first + h, mixed + h * rank, rounded,
                      out + (row * heads + first + h) * value);
  });
  count_weight_bytes(heads * (up_key->matrix_bytes() + up_value->matrix_bytes()));
}

}  // namespace moescope
