#include <algorithm>

#include "attend.h"
#include "numbers.h"
#include "ops.h"
#include "pool.h"

namespace moescope {
namespace {

// One matrix times one vector.
void multiply_vector(const Weights& weights, int64_t matrix, const float* x, QuantizedRows& rounded,
                     float* out) {
  rounded.resize(weights, 1);
  rounded.set_row(0, x);
  alignas(64) float product[kTile];
  for (int64_t tile = 0; tile < weights.tiles(); ++tile) {
    weights.multiply(matrix, tile, rounded, nullptr, 1, product);
    const int64_t start = tile * kTile;
    std::copy_n(product, std::min<int64_t>(kTile, weights.outputs() - start), out + start);
  }
}

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
    const int64_t size = Bundle::size(rank + rope, rank);
    const int64_t count = (end - first + kHeads - 1) / kHeads;
    memory.assign(count * size, 0.0f);  // heads beyond the last stay zero
    walking.clear();
    for (int64_t b = 0; b < count; ++b)
      walking.emplace_back(memory.data() + b * size, rank + rope, rank);
    for (int64_t h = first; h < end; ++h) {
      const int64_t head = row * heads + h;
      float* query = walking[(h - first) / kHeads].query((h - first) % kHeads);
      multiply_vector(*up_key, h, queries.nope + head * queries.nope_stride, rounded, query);
      std::copy_n(queries.rope + head * queries.rope_stride, rope, query + rank);
    }
    int64_t block;
    for (int64_t slot = 0; slot < lengths[row]; slot += block) {
      block = std::min({kSlotBlock, lengths[row] - slot, latents.together(slot)});
      const SlotRun keys{latents.at(row, slot), latents.slot_stride, rank};
      const SlotRun rotated{k_rope.at(row, slot), k_rope.slot_stride, rope};
      for (Bundle& bundle : walking) bundle.visit(keys, &rotated, keys, block, scale);
    }
    for (int64_t h = first; h < end; ++h)
      multiply_vector(*up_value, h, walking[(h - first) / kHeads].finish((h - first) % kHeads),
                      rounded, out + (row * heads + h) * value);
  });
  count_weight_bytes(heads * (up_key->matrix_bytes() + up_value->matrix_bytes()));
}

void ExpandedAttention::forward(const float* queries, int64_t seq, const int64_t* positions,
                                int64_t row, const Slots& latents, const Slots& k_rope,
                                float* out) const {
  static thread_local QuantizedRows caller_rounded;
  QuantizedRows& rounded = caller_rounded;  // the caller's, seen by all threads
  const int64_t heads = expand->matrices(), rope = k_rope.width;
  const int64_t slots = *std::max_element(positions, positions + seq) + 1;
  const Panels panels(heads, 0, slots, nope + rope, expand->outputs() - nope);
  rounded.resize(*expand, slots);
  parallel_rows(slots, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) rounded.set_row(slot, latents.at(row, slot));
  });
  const int64_t slot_blocks = (slots + kRowBlock - 1) / kRowBlock;
  parallel(heads * slot_blocks, [&](int64_t task) {
    const int64_t head = task / slot_blocks, first = task % slot_blocks * kRowBlock;
    const int64_t last = std::min<int64_t>(first + kRowBlock, slots);
    int32_t rows[kRowBlock];
    for (int64_t slot = first; slot < last; ++slot) rows[slot - first] = static_cast<int32_t>(slot);
    alignas(64) float product[kRowBlock * kTile];
    for (int64_t tile = 0; tile < expand->tiles(); ++tile) {
      expand->multiply(head, tile, rounded, rows, static_cast<int>(last - first), product);
      const int64_t start = tile * kTile, end = std::min(start + kTile, expand->outputs());
      for (int64_t n = start; n < std::min(end, nope); ++n)
        for (int64_t slot = first; slot < last; ++slot)
          panels.key(head, slot, n) = product[(slot - first) * kTile + n - start];
      for (int64_t slot = first; slot < last; ++slot)
        for (int64_t n = std::max(start, nope); n < end; ++n)
          panels.value(head, slot, n - nope) = product[(slot - first) * kTile + n - start];
    }
    for (int64_t slot = first; slot < last; ++slot)
      for (int64_t r = 0; r < rope; ++r) panels.key(head, slot, nope + r) = k_rope.at(row, slot)[r];
  });
  count_weight_bytes(heads * expand->matrix_bytes());
  panels.attend(queries, heads, heads, seq, positions, {scale}, out);
}

void LatentAttention::forward(float* x, const Tokens& tokens, const Slots& latents,
                              const Slots& k_rope) const {
  static thread_local QuantizedRows caller_rounded;
  static thread_local std::vector<float> caller_down, caller_queries, caller_compressed,
      caller_mixed;
  QuantizedRows& rounded = caller_rounded;  // the caller's, seen by all threads
  const int64_t heads = absorbed->up_key->matrices(), nope = absorbed->up_key->columns();
  const int64_t rank = latents.width, value = absorbed->up_value->outputs(), count = tokens.count();
  grow(caller_queries, count * heads * (nope + rope));
  grow(caller_compressed, count * (rank + rope));
  grow(caller_mixed, count * heads * value);
  float* queries = caller_queries.data();        // (tokens, heads, nope + rope)
  float* compressed = caller_compressed.data();  // (tokens, rank + rope)
  float* mixed = caller_mixed.data();            // (tokens, heads, v_head_dim)

  const Weights& first = query_down.weights ? *query_down.weights : *query.weights;
  round_normed(input_norm, {&first, latent.weights.get()}, x, count, rounded);
  if (query_down.weights) {
    grow(caller_down, count * query_down.weights->outputs());
    multiply_all({query_down.to(caller_down.data()), latent.to(compressed)}, rounded, count);
    round_normed(query_norm, {query.weights.get()}, caller_down.data(), count, rounded);
    multiply_all({query.to(queries)}, rounded, count);
  } else {
    multiply_all({query.to(queries), latent.to(compressed)}, rounded, count);
  }

  parallel_rows(count, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> unrotated;
    grow(unrotated, rope);
    for (int64_t token = first; token < last; ++token) {
      const float* cosine = tokens.cosine + token * (rope / 2);
      const float* sine = tokens.sine + token * (rope / 2);
      for (int64_t head = 0; head < heads; ++head) {
        float* query_rope = queries + (token * heads + head) * (nope + rope) + nope;
        std::copy_n(query_rope, rope, unrotated.data());
        rotate(unrotated.data(), cosine, sine, rope, interleave, query_rope);
      }
      const int64_t row = tokens.row_of[token], slot = tokens.positions[token];
      const float* from = compressed + token * (rank + rope);
      latent_norm.forward(from, latents.at(row, slot));
      rotate(from + rank, cosine, sine, rope, interleave, k_rope.at(row, slot));
    }
  });

  if (tokens.singles > 0) {
    std::vector<int64_t> lengths(tokens.singles);
    for (int64_t row = 0; row < tokens.singles; ++row) lengths[row] = tokens.positions[row] + 1;
    absorbed->forward({queries, queries + nope, nope + rope, nope + rope}, latents, k_rope,
                      lengths.data(), tokens.singles, mixed);
  }
  for (int64_t row = tokens.singles; row < tokens.rows; ++row) {
    const int64_t first = tokens.starts[row], seq = tokens.starts[row + 1] - first;
    expanded->forward(queries + first * heads * (nope + rope), seq, tokens.positions + first, row,
                      latents, k_rope, mixed + first * heads * value);
  }
  rounded.resize(*output.weights, count);
  parallel_rows(count, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token)
      rounded.set_row(token, mixed + token * heads * value);
  });
  multiply_all({output.add_to(x, residual_multiplier)}, rounded, count);
}

}  // namespace moescope
