// What the extension offers: whole pieces of the network, on float32 activations.
#pragma once
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "attend.h"
#include "weights.h"

namespace moescope {

// Bytes of weights that products have read since the process began.
int64_t weight_bytes_read();
void count_weight_bytes(int64_t bytes);

// A product with rows of activations: out (rows, matrices * outputs) = them times the transposed
// matrices, plus `bias` unless null, all times `factor`, and added to what `out` holds if `add`.
struct Product {
  const Weights* weights;
  const float* bias;
  float* out;
  bool add = false;
  float factor = 1;
};

// Several products of the same rows, in one parallel round; `activations` were made ready for all of
// the matrices.
void multiply_all(const std::vector<Product>& products, const QuantizedRows& activations,
                  int64_t rows);

// out (rows, matrices * outputs) = x (rows, columns) times the transposed matrices, plus `bias`
// unless null.
void linear(const Weights& weights, const float* x, int64_t rows, const float* bias, float* out);

// What stands between an expert's matrices: silu(gate) * up, or gpt-oss's (up + 1) * gate * sigmoid(1.702 * gate).
struct Activation {
  bool swigluoai = false;
  float limit = std::numeric_limits<float>::infinity();  // of gate from above, of up both ways
  // gate = activation; up is overwritten.
  void apply(float* gate, float* up, int64_t n) const;
};

// gate, up and down projections of experts of one width.
struct Experts {
  std::shared_ptr<const Weights> gate, up, down;
  std::vector<float> gate_bias{}, up_bias{}, down_bias{};  // (matrices, outputs), or empty
  Activation activation{};
};

// The feed-forward part of a layer: routed experts, shared experts, or both.
class FeedForward {
 public:
  // Either may lack its weights. `shared` are experts that every token visits with weight one.
  FeedForward(Experts routed, Experts shared);

  // out (tokens, hidden) += `factor` times the chosen experts' outputs, weighted, plus the shared
  // experts'. topk_ids and topk_weights are (tokens, slots); a negative id marks an unused slot.
  void forward(const float* x, int64_t tokens, const int64_t* topk_ids, const float* topk_weights,
               int64_t slots, float* out, float factor = 1) const;

  const Weights& any() const { return routed_.gate ? *routed_.gate : *shared_.gate; }
  int64_t routed_experts() const { return routed_.gate ? routed_.gate->matrices() : 0; }

 private:
  // The same with all chosen experts in memory.
  void forward_held(const float* x, int64_t tokens, const int64_t* topk_ids,
                    const float* topk_weights, int64_t slots, float* out, float factor,
                    bool with_shared) const;

  Experts routed_, shared_;
};

// Slots of one kind of number that a cache holds: (blocks, block_slots, width), of bf16 or float32. A
// row's slots lie in the blocks that its line of the table (rows, table_width) names, in order.
struct Slots {
  void* data;
  bool bf16;
  int64_t block_stride, slot_stride, width, block_slots;
  const int64_t* table = nullptr;
  int64_t table_width = 0;

  Slots of_rows(const int64_t* row_table, int64_t row_table_width) const {
    Slots slots = *this;
    slots.table = row_table;
    slots.table_width = row_table_width;
    return slots;
  }
  template <typename T>
  T* at(int64_t row, int64_t slot) const {
    return static_cast<T*>(data) + table[row * table_width + slot / block_slots] * block_stride +
           slot % block_slots * slot_stride;
  }
  // Keep a slot's numbers (width,).
  void put(int64_t row, int64_t slot, const float* numbers) const;
  // out (width,) = a slot's numbers.
  void get(int64_t row, int64_t slot, float* out) const;
  // How many slots lie together from this one on.
  int64_t together(int64_t slot) const { return block_slots - slot % block_slots; }
};

// Latent attention of one new token a sequence, over latents that are never expanded.
struct AbsorbedAttention {
  std::shared_ptr<const Weights> up_key;    // heads matrices, (kv_lora_rank, qk_nope_head_dim)
  std::shared_ptr<const Weights> up_value;  // heads matrices, (v_head_dim, kv_lora_rank)
  float scale;

  // Rotated queries of all rows' heads; a head's numbers stand `nope_stride` or `rope_stride` apart.
  struct Queries {
    const float *nope, *rope;
    int64_t nope_stride, rope_stride;
  };
  // out (batch, heads, v_head_dim); row b sees its first lengths[b] slots.
  void forward(const Queries& queries, const Slots& latents, const Slots& k_rope,
               const int64_t* lengths, int64_t batch, float* out) const;

 private:
  template <typename T>
  void attend(const Queries& queries, const Slots& latents, const Slots& k_rope,
              const int64_t* lengths, int64_t batch, float* out) const;
};

// Latent attention of a prompt, whose latents are expanded to keys and values.
struct ExpandedAttention {
  std::shared_ptr<const Weights> expand;  // heads matrices, (nope + v_head_dim, kv_lora_rank)
  int64_t nope;
  float scale;

  // One row of a batch: queries (seq, heads, nope + rope), rotated, each of which sees the slots up
  // to its position; out (seq, heads, v_head_dim).
  void forward(const float* queries, int64_t seq, const int64_t* positions, int64_t row,
               const Slots& latents, const Slots& k_rope, float* out) const;

 private:
  template <typename T>
  void attend(const float* queries, int64_t seq, const int64_t* positions, int64_t row,
              const Slots& latents, const Slots& k_rope, float* out) const;
};

// --- half a layer in one call --------------------------------------------------------------------

struct Norm {
  std::vector<float> weight;
  float eps;
  int64_t width() const { return static_cast<int64_t>(weight.size()); }
  void forward(const float* x, float* out) const;
};

struct Projection {
  std::shared_ptr<const Weights> weights;
  std::vector<float> bias;  // empty without
  Product to(float* out) const {
    return {weights.get(), bias.empty() ? nullptr : bias.data(), out};
  }
  Product add_to(float* out, float factor) const {
    return {weights.get(), bias.empty() ? nullptr : bias.data(), out, true, factor};
  }
};

// What follows the layers: a norm and the map to logits.
struct Head {
  Norm norm;
  Projection projection;
  // states (rows, hidden) to logits (rows, outputs).
  void forward(const float* states, int64_t rows, float* logits) const;
};

// New tokens of several rows, one row after the other, and where they stand. The first `singles` rows
// have a token each that is read as generated ones are; the others' are read as prompts.
struct Tokens {
  int64_t rows, singles;
  const int64_t* starts;       // (rows + 1,), of the rows among the tokens
  const int64_t* row_of;       // (tokens,)
  const int64_t* positions;    // (tokens,)
  const float *cosine, *sine;  // (tokens, rotated width / 2)
  int64_t count() const { return starts[rows]; }
};

// Rotated pairs come out as halves (Su et al. 2021, eq. 15); `out` may not be `x`.
void rotate(const float* x, const float* cosine, const float* sine, int64_t width, bool interleave,
            float* out);

// rounded = norm(x) for all rows, as all of the readers want it.
void round_normed(const Norm& norm, std::initializer_list<const Weights*> readers, const float* x,
                  int64_t rows, QuantizedRows& rounded);

// What is done of attention: keys and values are stored, queries look at what is stored, or both.
enum class Half { store, look, both };

// x (tokens, hidden) += `residual_multiplier` times attention of norm(x), which stores keys and values
// in the cache; where it only stores, x stays.
struct Attention {
  Norm input_norm;
  Projection output;
  float residual_multiplier = 1;

  virtual ~Attention() = default;
  virtual int64_t key_width() const = 0;    // of a slot, all heads together
  virtual int64_t value_width() const = 0;  // likewise
  virtual int64_t rotated_width() const = 0;
  virtual void forward(float* x, const Tokens& tokens, Half half, const Slots& keys,
                       const Slots& values) const = 0;
};

// Multi-head latent attention: a slot's key is its latent, its value the rotated key of all heads.
struct LatentAttention : Attention {
  Norm query_norm, latent_norm;
  Projection
      query_down;  // without weights where queries have no low rank; query_norm is empty then
  Projection query, latent;
  std::shared_ptr<const AbsorbedAttention> absorbed;
  std::shared_ptr<const ExpandedAttention> expanded;
  int64_t rope;
  bool interleave;  // whether rotated pairs are neighbours, or halves

  int64_t key_width() const override { return absorbed->up_key->outputs(); }
  int64_t value_width() const override { return rope; }
  int64_t rotated_width() const override { return rope; }
  void forward(float* x, const Tokens& tokens, Half half, const Slots& latents,
               const Slots& k_rope) const override;
};

// Grouped-query attention: `heads / kv_heads` queries share a key and a value.
struct GroupedAttention : Attention {
  Projection query, key, value;
  Norm query_norm,
      key_norm;  // of each head, or of all at once; without a weight where there is none
  int64_t heads, kv_heads, width;
  int64_t rope;  // how many numbers of a head are rotated, from its front
  float scale;
  bool interleave;
  float clip = std::numeric_limits<float>::infinity();  // magnitude of queries, keys and values
  int64_t window = kNoWindow;
  std::vector<float> sinks;  // (heads,), or empty

  Lookback lookback() const { return {scale, window, sinks.empty() ? nullptr : sinks.data()}; }

  int64_t key_width() const override { return kv_heads * width; }
  int64_t value_width() const override { return kv_heads * width; }
  int64_t rotated_width() const override { return rope; }
  void forward(float* x, const Tokens& tokens, Half half, const Slots& keys,
               const Slots& values) const override;

 private:
  template <typename T>
  void attend(const float* queries, const Tokens& tokens, const Slots& keys, const Slots& values,
              float* mixed) const;
  template <typename T>
  void attend_singly(const float* queries, const Tokens& tokens, const Slots& keys,
                     const Slots& values, float* mixed) const;
  template <typename T>
  void attend_prompt(const float* queries, int64_t seq, const int64_t* positions, int64_t row,
                     const Slots& keys, const Slots& values, float* mixed) const;
};

// `relu` leaves the choice to the logits, of which those above zero alone are chosen.
enum class Scoring { softmax, sigmoid, sqrtsoftplus, relu };

// Experts that are fixed for each token's id, (vocab, top_k).
struct HashTable {
  std::vector<int64_t> ids;
  int64_t vocab;
};

// What routers chose, (tokens, slots) each: slots that no expert is left for, or that a router of fewer
// experts leaves over, have id -1, weight 0 and score 0.
struct Chosen {
  int64_t slots;
  int64_t* ids;
  float* weights;
  float* scores;  // before they become weights; null if nobody asks

  // Those of the tokens from this one on.
  Chosen from(int64_t token) const {
    const int64_t at = token * slots;
    return {slots, ids + at, weights + at, scores ? scores + at : nullptr};
  }
  // Nothing is chosen for the first `tokens`.
  void clear(int64_t tokens) const;
  // What was chosen for one token is another's, and nothing the one's, unless they are the same.
  void move(int64_t from, int64_t to) const;
};

// The router's matrix and rule, in float32: scores, then the best experts of the best groups. Vectors
// are (experts,), or empty without.
struct Router {
  std::shared_ptr<const float> weight;  // (experts, hidden)
  std::vector<float> logit_bias;
  std::vector<float> bias;        // enters the choice only
  std::vector<uint8_t> disabled;  // experts that are as if they did not exist
  std::vector<uint8_t> forced;    // experts that every token visits; they take their place in top_k
  HashTable table;                // what chooses instead of scores; empty without
  int64_t experts, hidden, top_k, groups, kept_groups;
  int64_t best_of_group;  // how many of its best scores rank a group
  Scoring scoring;
  bool normalise;
  float factor;
  // Turns one token's logits (experts,) into scores, in place, and writes what it chooses to the
  // token's slots, of which there are `top_k` at least. `id` is the token's, which the table alone
  // needs, below its vocab.
  void decide(float* logits, int64_t id, Chosen slots) const;

 private:
  // Turns one token's logits into scores; with relu they stay what they are.
  void score(float* logits) const;
  // Takes the best `top_k` by score, or logit, and bias.
  void choose(const float* scores, int64_t* topk_ids) const;
};

// Lets each token's own router decide: x (tokens, hidden), `routers` and ids (tokens,). They may differ
// from token to token, but in the number of experts and the hidden width.
void route(const Router* const* routers, const float* x, const int64_t* ids, int64_t tokens,
           Chosen chosen);

// x (tokens, hidden) += `residual_multiplier` times the feed-forward part of norm(x).
struct FeedForwardBlock {
  Norm norm;
  float residual_multiplier;
  std::shared_ptr<const Router> router;  // null without routed experts
  std::shared_ptr<const FeedForward> layer;
  // `routers` (tokens,) are the tokens' own, and `chosen` is where they write; both are not looked at
  // without routed experts.
  void forward(float* x, const int64_t* ids, int64_t tokens, const Router* const* routers,
               Chosen chosen) const;
};

// The routers of all layers, null where one has no routed experts.
using Routers = std::vector<std::shared_ptr<const Router>>;

// Other routers than a network's own, for some rows.
struct Steering {
  std::vector<Routers> sets;
  std::vector<int64_t> set_of_row;  // (rows,): the place of a row's own in `sets`, or -1
};

// Angles of rotary positions (Su et al. 2021, eq. 15).
struct Rotation {
  std::vector<float> frequencies;  // (rotated width / 2,)
  float factor;                    // of cosine and sine
  void at(int64_t position, float* cosine, float* sine) const;
};

// Everything below the output head in one call.
struct Decoder {
  std::shared_ptr<const Weights> embedding;  // one matrix, a row a token id
  float embedding_multiplier;
  Rotation rotation;
  std::vector<std::shared_ptr<const Attention>> attention;
  std::vector<std::shared_ptr<const FeedForwardBlock>> feed_forward;
  // ids and positions (tokens,), ids below the embedding's outputs. The first rows of out (tokens,
  // hidden) become what the last layer hands on for the `wanted` tokens, in order; of the others it
  // does no more than store keys and values. `starts` and `singles` are as in `Tokens`, `table` (rows,
  // table_width) as in `Slots`. `keys` and `values` have one entry a layer. `chosen`, (layers with
  // routers, tokens, slots), gets what was chosen, unless its `ids` are null; its slots are no fewer
  // than any router's top_k, and empty where the last layer was not asked.
  void forward(const int64_t* ids, const int64_t* positions, int64_t rows, int64_t singles,
               const int64_t* starts, const int64_t* table, int64_t table_width,
               const std::vector<Slots>& keys, const std::vector<Slots>& values,
               const std::vector<int64_t>& wanted, const Steering& steering, Chosen chosen,
               float* out) const;
  // Experts that any token visits at most in one layer, 0 without routers.
  int64_t most_slots(const Steering& steering) const;
  // Layers with routers.
  int64_t sparse_layers() const;
};

// For each row of logits (rows, vocab): its `count` greatest, in order, of equal ones the first,
// with their ids, both (rows, count).
void likeliest(const float* logits, int64_t rows, int64_t vocab, int64_t count, int64_t* ids,
               float* values);

// out (rows,) = log(sum(exp(scales * logits))), with one of scales (rows,) for each row.
void log_sums(const float* logits, int64_t rows, int64_t vocab, const float* scales, float* out);

}  // namespace moescope
