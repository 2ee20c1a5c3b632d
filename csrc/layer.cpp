#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "numbers.h"
#include "ops.h"
#include "pool.h"
#include "records.h"

namespace moescope {
namespace {

constexpr int64_t kBlock = 16;  // tokens, or experts, that a task of the router takes
constexpr float kNever = -std::numeric_limits<float>::infinity();  // score of who is ruled out

// Finds the places of the `count` largest of `values`, in order; of equal ones the first.
void find_largest(const float* values, int64_t n, int64_t count, std::vector<int64_t>& chosen) {
  chosen.clear();
  for (int64_t i = 0; i < n; ++i) {
    const bool full = static_cast<int64_t>(chosen.size()) == count;
    if (full && !(values[i] > values[chosen.back()])) continue;
    if (!full) chosen.push_back(i);
    size_t at = chosen.size() - 1;
    for (; at > 0 && values[i] > values[chosen[at - 1]]; --at) chosen[at] = chosen[at - 1];
    chosen[at] = i;
  }
}

}  // namespace

void Slots::put(int64_t row, int64_t slot, const float* numbers) const {
  if (bf16)
    kernels().attend_bf16.store(numbers, width, at<Bf16>(row, slot));
  else
    std::copy_n(numbers, width, at<float>(row, slot));
}

void Slots::get(int64_t row, int64_t slot, float* out) const {
  if (bf16)
    std::transform(at<Bf16>(row, slot), at<Bf16>(row, slot) + width, out,
                   [](Bf16 number) { return float_of_bf16(number.bits); });
  else
    std::copy_n(at<float>(row, slot), width, out);
}

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

void round_normed(const Norm& norm, std::initializer_list<const Weights*> readers, const float* x,
                  int64_t rows, QuantizedRows& rounded) {
  rounded.resize(readers, rows);
  parallel_rows(rows, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> normed;
    grow(normed, norm.width());
    for (int64_t row = first; row < last; ++row) {
      norm.forward(x + row * norm.width(), normed.data());
      rounded.set_row(row, normed.data());
    }
  });
}

void Norm::forward(const float* x, float* out) const {
  kernels().rms_norm(x, weight.data(), eps, width(), out);
}

void Head::forward(const float* states, int64_t rows, float* logits) const {
  static thread_local QuantizedRows scratch;
  QuantizedRows& rounded = scratch;  // the caller's, seen by all threads
  round_normed(norm, {projection.weights.get()}, states, rows, rounded);
  multiply_all({projection.to(logits)}, rounded, rows);
}

void route(const Router* const* routers, const float* x, const int64_t* ids, int64_t tokens,
           Chosen chosen) {
  static thread_local std::vector<float> caller_scores;
  const int64_t experts = routers[0]->experts, hidden = routers[0]->hidden, slots = chosen.slots;
  grow(caller_scores, tokens * experts);
  float* scores = caller_scores.data();  // (tokens, experts); the caller's, seen by all threads
  // Even one token's work is shared: memory gives one thread but half of what it gives two.
  const int64_t expert_blocks = (experts + kBlock - 1) / kBlock;
  parallel((tokens + kBlock - 1) / kBlock * expert_blocks, [&](int64_t task) {
    const int64_t first = task % expert_blocks * kBlock, start = task / expert_blocks * kBlock;
    const int64_t count = std::min(kBlock, experts - first);
    for (int64_t token = start; token < std::min(start + kBlock, tokens); ++token)
      kernels().dot_rows(routers[token]->weight.get() + first * hidden, count, x + token * hidden,
                         hidden, scores + token * experts + first);
  });
  parallel_rows(tokens, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token)
      routers[token]->decide(scores + token * experts, ids ? ids[token] : 0,
                             {slots, chosen.ids + token * slots, chosen.weights + token * slots,
                              chosen.scores ? chosen.scores + token * slots : nullptr});
  });
}

void Chosen::clear(int64_t tokens) const {
  std::fill_n(ids, tokens * slots, -1);
  std::fill_n(weights, tokens * slots, 0.0f);
  if (scores) std::fill_n(scores, tokens * slots, 0.0f);
}

void Chosen::move(int64_t from, int64_t to) const {
  if (from == to) return;
  const Chosen source = this->from(from), target = this->from(to);
  std::copy_n(source.ids, slots, target.ids);
  std::copy_n(source.weights, slots, target.weights);
  if (scores) std::copy_n(source.scores, slots, target.scores);
  source.clear(1);
}

void Router::decide(float* logits, int64_t id, Chosen slots) const {
  score(logits);
  if (table.ids.empty())
    choose(logits, slots.ids);
  else
    std::copy_n(table.ids.data() + id * top_k, top_k, slots.ids);
  std::fill(slots.ids + top_k, slots.ids + slots.slots, -1);
  float sum = 1e-20f;
  for (int64_t slot = 0; slot < slots.slots; ++slot) {
    float& weight = slots.weights[slot];
    weight = slots.ids[slot] < 0 ? 0 : logits[slots.ids[slot]];
    if (scoring == Scoring::relu) weight = std::max(weight, 0.0f);
    if (slots.scores) slots.scores[slot] = weight;
    sum += weight;
  }
  for (int64_t slot = 0; slot < slots.slots; ++slot)
    slots.weights[slot] = slots.weights[slot] / (normalise ? sum : 1.0f) * factor;
}

void Router::score(float* logits) const {
  for (size_t e = 0; e < logit_bias.size(); ++e) logits[e] += logit_bias[e];
  for (size_t e = 0; e < disabled.size(); ++e)
    if (disabled[e]) logits[e] = kNever;
  if (scoring == Scoring::softmax)
    kernels().softmax(logits, 1, experts);
  else if (scoring == Scoring::sigmoid)
    for (int64_t e = 0; e < experts; ++e) logits[e] = 1 / (1 + std::exp(-logits[e]));
  else if (scoring == Scoring::sqrtsoftplus)
    // Softplus as PyTorch takes it: the logit itself where the sum would lose it.
    for (int64_t e = 0; e < experts; ++e)
      logits[e] = std::sqrt(logits[e] > 20 ? logits[e] : std::log1p(std::exp(logits[e])));
}

void Router::choose(const float* scores, int64_t* topk_ids) const {
  static thread_local std::vector<float> choice, group_scores;
  static thread_local std::vector<int64_t> chosen;
  const int64_t size = experts / groups;
  grow(choice, experts);
  grow(group_scores, groups);
  for (int64_t e = 0; e < experts; ++e) choice[e] = bias.empty() ? scores[e] : scores[e] + bias[e];
  if (scoring == Scoring::relu)
    for (int64_t e = 0; e < experts; ++e)
      if (choice[e] <= 0) choice[e] = kNever;
  for (size_t e = 0; e < disabled.size(); ++e)
    if (disabled[e]) choice[e] = kNever;
  if (kept_groups < groups) {
    for (int64_t g = 0; g < groups; ++g) {
      find_largest(choice.data() + g * size, size, std::min(best_of_group, size), chosen);
      group_scores[g] = choice[g * size + chosen.front()];
      for (size_t i = 1; i < chosen.size(); ++i)
        if (choice[g * size + chosen[i]] > kNever) group_scores[g] += choice[g * size + chosen[i]];
    }
    find_largest(group_scores.data(), groups, kept_groups, chosen);
    for (int64_t g = 0; g < groups; ++g)
      if (std::find(chosen.begin(), chosen.end(), g) == chosen.end())
        std::fill_n(choice.begin() + g * size, size, kNever);
  }
  for (size_t e = 0; e < forced.size(); ++e)
    if (forced[e]) choice[e] = -kNever;
  find_largest(choice.data(), experts, top_k, chosen);
  for (int64_t slot = 0; slot < top_k; ++slot)
    topk_ids[slot] = choice[chosen[slot]] == kNever ? -1 : chosen[slot];
}

void FeedForwardBlock::forward(float* x, const int64_t* ids, int64_t tokens,
                               const Router* const* routers, Chosen chosen) const {
  static thread_local std::vector<float> caller_normed;
  const int64_t hidden = norm.width();
  grow(caller_normed, tokens * hidden);
  float* normed = caller_normed.data();
  parallel_rows(tokens, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token)
      norm.forward(x + token * hidden, normed + token * hidden);
  });
  if (!router)
    chosen = {};
  else
    route(routers, normed, ids, tokens, chosen);
  layer->forward(normed, tokens, chosen.ids, chosen.weights, chosen.slots, x, residual_multiplier);
}

}  // namespace moescope
