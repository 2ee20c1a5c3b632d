#include <algorithm>
#include <cmath>
#include <limits>

#include "ops.h"
#include "pool.h"

namespace moescope {
namespace {

void quantize_rows(QuantizedRows& quantized, const Weights& weights, const float* x, int64_t rows) {
  quantized.resize(weights, rows);
  for (int64_t row = 0; row < rows; ++row)
    quantized.set(row, 0, x + row * weights.columns(), weights.columns(),
                  weights.padded_columns());
}

// Rotated pairs come out as halves (Su et al. 2021, eq. 15).
void rotate(const float* x, const float* cosine, const float* sine, int64_t width, bool interleave,
            float* out) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = interleave ? x[2 * i] : x[i];
    const float second = interleave ? x[2 * i + 1] : x[half + i];
    out[i] = first * cosine[i] - second * sine[i];
    out[half + i] = second * cosine[i] + first * sine[i];
  }
}

void grow(std::vector<float>& held, int64_t size) {
  if (static_cast<int64_t>(held.size()) < size) held.resize(size);
}

// Marks the `count` largest of `values` in `chosen`; of equal ones the first. `count` is small.
void mark_largest(const float* values, int64_t n, int64_t count, std::vector<int64_t>& chosen) {
  chosen.clear();
  for (int64_t round = 0; round < count; ++round) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (std::find(chosen.begin(), chosen.end(), i) != chosen.end()) continue;
      if (best < 0 || values[i] > values[best]) best = i;
    }
    chosen.push_back(best);
  }
}

}  // namespace

void Norm::forward(const float* x, int64_t rows, float* out) const {
  const int64_t width = static_cast<int64_t>(weight.size());
  for (int64_t row = 0; row < rows; ++row)
    kernels().rms_norm(x + row * width, weight.data(), eps, width, out + row * width);
}

void AttentionStep::forward(float* x, int64_t batch, const float* cosine, const float* sine,
                            const AbsorbedAttention::Cache& latents,
                            const AbsorbedAttention::Cache& k_rope,
                            const int64_t* positions) const {
  static thread_local QuantizedRows quantized;
  static thread_local std::vector<float> normed, down, queries, compressed, q_nope, q_rope, mixed;
  const int64_t heads = attention->up_key->matrices(), nope = attention->up_key->columns();
  const int64_t rank = latents.width, value = attention->up_value->outputs();
  grow(normed, batch * static_cast<int64_t>(input_norm.weight.size()));
  grow(queries, batch * heads * (nope + rope));
  grow(compressed, batch * (rank + rope));
  grow(q_nope, batch * heads * nope);
  grow(q_rope, batch * heads * rope);
  grow(mixed, batch * heads * value);

  input_norm.forward(x, batch, normed.data());
  if (query_down.weights) {
    grow(down, batch * query_down.weights->outputs());
    quantize_rows(quantized, *query_down.weights, normed.data(), batch);
    multiply_all({query_down.to(down.data()), latent.to(compressed.data())}, quantized.view(),
                 batch);
    query_norm.forward(down.data(), batch, down.data());
    quantize_rows(quantized, *query.weights, down.data(), batch);
    multiply_all({query.to(queries.data())}, quantized.view(), batch);
  } else {
    quantize_rows(quantized, *query.weights, normed.data(), batch);
    multiply_all({query.to(queries.data()), latent.to(compressed.data())}, quantized.view(),
                 batch);
  }

  std::vector<int64_t> lengths(batch);
  for (int64_t row = 0; row < batch; ++row) {
    const float *cos = cosine + row * (rope / 2), *sin = sine + row * (rope / 2);
    for (int64_t head = row * heads; head < (row + 1) * heads; ++head) {
      const float* from = queries.data() + head * (nope + rope);
      std::copy_n(from, nope, q_nope.data() + head * nope);
      rotate(from + nope, cos, sin, rope, interleave, q_rope.data() + head * rope);
    }
    const float* from = compressed.data() + row * (rank + rope);
    latent_norm.forward(from, 1, latents.data + row * latents.row_stride +
                                     positions[row] * latents.slot_stride);
    rotate(from + rank, cos, sin, rope, interleave,
           k_rope.data + row * k_rope.row_stride + positions[row] * k_rope.slot_stride);
    lengths[row] = positions[row] + 1;
  }
  attention->forward(q_nope.data(), q_rope.data(), latents, k_rope, lengths.data(), batch,
                     mixed.data());
  quantize_rows(quantized, *output.weights, mixed.data(), batch);
  multiply_all({output.to(x, true)}, quantized.view(), batch);
}

void Router::forward(const float* x, int64_t tokens, int64_t* topk_ids,
                     float* topk_weights) const {
  static thread_local std::vector<float> scores, choice, group_scores;
  static thread_local std::vector<int64_t> chosen;
  const int64_t hidden = static_cast<int64_t>(weight.size()) / experts, size = experts / groups;
  grow(scores, experts);
  grow(choice, experts);
  grow(group_scores, groups);
  for (int64_t token = 0; token < tokens; ++token) {
    kernels().dot_rows(weight.data(), experts, x + token * hidden, hidden, scores.data());
    if (sigmoid)
      for (int64_t e = 0; e < experts; ++e) scores[e] = 1 / (1 + std::exp(-scores[e]));
    else
      kernels().softmax(scores.data(), 1, experts);
    for (int64_t e = 0; e < experts; ++e)
      choice[e] = bias.empty() ? scores[e] : scores[e] + bias[e];
    if (kept_groups < groups) {
      for (int64_t g = 0; g < groups; ++g) {
        mark_largest(choice.data() + g * size, size, std::min(best_of_group, size), chosen);
        group_scores[g] = 0;
        for (int64_t e : chosen) group_scores[g] += choice[g * size + e];
      }
      mark_largest(group_scores.data(), groups, kept_groups, chosen);
      for (int64_t g = 0; g < groups; ++g)
        if (std::find(chosen.begin(), chosen.end(), g) == chosen.end())
          std::fill_n(choice.begin() + g * size, size, -std::numeric_limits<float>::infinity());
    }
    mark_largest(choice.data(), experts, top_k, chosen);
    float sum = 1e-20f;
    for (int64_t e : chosen) sum += scores[e];
    for (int64_t slot = 0; slot < top_k; ++slot) {
      topk_ids[token * top_k + slot] = chosen[slot];
      topk_weights[token * top_k + slot] =
          scores[chosen[slot]] / (normalise ? sum : 1.0f) * factor;
    }
  }
}

void FeedForwardStep::forward(float* x, int64_t tokens) const {
  static thread_local std::vector<float> normed, output, topk_weights;
  static thread_local std::vector<int64_t> topk_ids;
  const int64_t hidden = static_cast<int64_t>(norm.weight.size());
  const int64_t slots = router ? router->top_k : 0;
  grow(normed, tokens * hidden);
  grow(output, tokens * hidden);
  grow(topk_weights, tokens * slots);
  topk_ids.resize(tokens * slots);
  norm.forward(x, tokens, normed.data());
  if (router) router->forward(normed.data(), tokens, topk_ids.data(), topk_weights.data());
  layer->forward(normed.data(), tokens, topk_ids.data(), topk_weights.data(), slots,
                 output.data());
  kernels().axpy(1, output.data(), x, tokens * hidden);
}

}  // namespace moescope
