// What the extension offers: whole pieces of the network, on float32 activations.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "weights.h"

namespace moescope {

// Bytes of weights that products have read since the process began.
int64_t weight_bytes_read();
void count_weight_bytes(int64_t bytes);

// out (rows, outputs) = x (rows, columns) times the transposed matrix, plus `bias` unless null.
void linear(const Weights& weights, const float* x, int64_t rows, const float* bias, float* out);

// gate, up and down projections of experts of one width.
struct Experts {
  std::shared_ptr<const Weights> gate, up, down;
};

// The feed-forward part of a layer: routed experts, shared experts, or both.
class FeedForward {
 public:
  // Either may lack its weights. `shared` are experts that every token visits with weight one.
  FeedForward(Experts routed, Experts shared);

  // out (tokens, hidden): chosen experts' outputs, weighted, plus the shared experts'.
  // topk_ids and topk_weights are (tokens, slots); a negative id marks an unused slot.
  void forward(const float* x, int64_t tokens, const int64_t* topk_ids, const float* topk_weights,
               int64_t slots, float* out) const;

  const Weights& any() const { return routed_.gate ? *routed_.gate : *shared_.gate; }
  int64_t routed_experts() const { return routed_.gate ? routed_.gate->matrices() : 0; }

 private:
  Experts routed_, shared_;
};

// Latent attention of one new token a sequence, over latents that are never expanded.
struct AbsorbedAttention {
  std::shared_ptr<const Weights> up_key;    // heads matrices, (kv_lora_rank, qk_nope_head_dim)
  std::shared_ptr<const Weights> up_value;  // heads matrices, (v_head_dim, kv_lora_rank)
  float scale;

  struct Cache {
    const float* data;
    int64_t row_stride, slot_stride, width;
  };
  // q_nope (batch, heads, nope), q_rope (batch, heads, rope), out (batch, heads, v_head_dim);
  // row b sees its first lengths[b] slots.
  void forward(const float* q_nope, const float* q_rope, const Cache& latents, const Cache& k_rope,
               const int64_t* lengths, int64_t batch, float* out) const;
};

}  // namespace moescope
