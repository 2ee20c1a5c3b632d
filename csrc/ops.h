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

// A product with rows of activations: out (rows, outputs) = them times the transposed matrix, plus
// `bias` unless null, and added to what `out` holds if `add`.
struct Product {
  const Weights* weights;
  const float* bias;
  float* out;
  bool add = false;
};

// Several products of the same rows with matrices of one format, in one parallel round.
void multiply_all(const std::vector<Product>& products, const Activations& activations,
                  int64_t rows);

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
    float* data;
    int64_t row_stride, slot_stride, width;
  };
  // q_nope (batch, heads, nope), q_rope (batch, heads, rope), out (batch, heads, v_head_dim);
  // row b sees its first lengths[b] slots.
  void forward(const float* q_nope, const float* q_rope, const Cache& latents, const Cache& k_rope,
               const int64_t* lengths, int64_t batch, float* out) const;
};

// --- one new token a sequence: half a layer in one call ------------------------------------------

struct Norm {
  std::vector<float> weight;
  float eps;
  void forward(const float* x, int64_t rows, float* out) const;
};

struct Projection {
  std::shared_ptr<const Weights> weights;
  std::vector<float> bias;  // empty without
  Product to(float* out, bool add = false) const {
    return {weights.get(), bias.empty() ? nullptr : bias.data(), out, add};
  }
};

// x (batch, hidden) += latent attention of norm(x), which stores what it leaves behind in the cache.
struct AttentionStep {
  Norm input_norm, query_norm, latent_norm;
  Projection query_down;  // without weights where queries have no low rank; query_norm is empty then
  Projection query, latent, output;
  std::shared_ptr<const AbsorbedAttention> attention;
  int64_t rope;
  bool interleave;  // whether rotated pairs are neighbours, or halves

  // cosine and sine are (batch, rope / 2); row b stands at positions[b].
  void forward(float* x, int64_t batch, const float* cosine, const float* sine,
               const AbsorbedAttention::Cache& latents, const AbsorbedAttention::Cache& k_rope,
               const int64_t* positions) const;
};

// The router's matrix and rule, in float32: scores, then the best experts of the best groups.
struct Router {
  std::vector<float> weight;  // (experts, hidden)
  std::vector<float> bias;    // (experts,), enters the choice only; empty without
  int64_t experts, top_k, groups, kept_groups;
  int64_t best_of_group;  // how many of its best scores rank a group
  bool sigmoid, normalise;
  float factor;
  void forward(const float* x, int64_t tokens, int64_t* topk_ids, float* topk_weights) const;
};

// x (tokens, hidden) += feed-forward part of norm(x).
struct FeedForwardStep {
  Norm norm;
  std::shared_ptr<const Router> router;  // null without routed experts
  std::shared_ptr<const FeedForward> layer;
  void forward(float* x, int64_t tokens) const;
};

}  // namespace moescope
