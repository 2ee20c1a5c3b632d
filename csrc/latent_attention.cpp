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
  if (latents.bf16)
    attend<Bf16>(queries, latents, k_rope, lengths, batch, out);
  else
    attend<float>(queries, latents, k_rope, lengths, batch, out);
  count_weight_bytes(up_key->matrices() * (up_key->matrix_bytes() + up_value->matrix_bytes()));
}

template <typename T>
void AbsorbedAttention::attend(const Queries& queries, const Slots& latents, const Slots& k_rope,
                               const int64_t* lengths, int64_t batch, float* out) const {
  static thread_local std::vector<float> caller_absorbed, caller_found;
  const int64_t heads = up_key->matrices(), value = up_value->outputs();
  const int64_t rank = latents.width, rope = k_rope.width;
  // query (rank + rope,) of a row's head
  const auto absorb = [&](int64_t head, float* query) {
    static thread_local QuantizedRows rounded;
    multiply_vector(*up_key, head % heads, queries.nope + head * queries.nope_stride, rounded,
                    query);
    std::copy_n(queries.rope + head * queries.rope_stride, rope, query + rank);
  };
  // What lies beyond one run is shared among threads by runs; what is not, by heads. A task takes as
  // many heads as leave every thread work: they share what they read of the cache.
  const int64_t most = runs_of(*std::max_element(lengths, lengths + batch));
  int64_t walks = 0;
  for (int64_t row = 0; row < batch; ++row) walks += runs_of(lengths[row]);
  const bool even = walks % threads() == 0 || walks >= 4 * threads();
  const int64_t at_once =
      even ? heads : std::max<int64_t>(1, heads / (kHeads * threads())) * kHeads;
  const int64_t parts = (heads + at_once - 1) / at_once;
  const int64_t most_heads = attention_loops<T>(kernels()).heads;  // of a bundle
  Findings findings(caller_found, batch * heads, most, rank);
  const auto finish = [&](int64_t head) {
    static thread_local QuantizedRows rounded;
    static thread_local std::vector<float> mixed;
    grow(mixed, rank);
    findings.join(head, runs_of(lengths[head / heads]), scale, mixed.data());
    multiply_vector(*up_value, head % heads, mixed.data(), rounded, out + head * value);
  };
  grow(caller_absorbed, most > 1 ? batch * heads * (rank + rope) : 0);
  float* absorbed = caller_absorbed.data();  // (batch * heads, rank + rope), of several runs
  if (most > 1)
    parallel(batch * heads, [&](int64_t head) { absorb(head, absorbed + head * (rank + rope)); });
  parallel(batch * most * parts, [&](int64_t task) {
    static thread_local std::vector<float> memory, query;
    static thread_local std::vector<Bundle<T>> walking;
    const int64_t row = task / (most * parts), run = task / parts % most;
    const int64_t start = run * kRun, stop = std::min(start + kRun, lengths[row]);
    if (start >= stop) return;
    const int64_t first = task % parts * at_once, end = std::min(first + at_once, heads);
    const typename Bundle<T>::Widths widths{rank, rope, rank};
    const int64_t size = Bundle<T>::size(widths);
    const int64_t count = (end - first + most_heads - 1) / most_heads;
    float* zeroed = zeros(memory, count * size);
    grow(query, rank + rope);
    walking.clear();
    for (int64_t b = 0; b < count; ++b)
      walking.emplace_back(zeroed + b * size, widths,
                           std::min(most_heads, end - first - b * most_heads));
    for (int64_t h = first; h < end; ++h) {
      const int64_t head = row * heads + h;
      if (most == 1) absorb(head, query.data());
      walking[(h - first) / most_heads].set_query(
          (h - first) % most_heads, most == 1 ? query.data() : absorbed + head * (rank + rope));
    }
    int64_t block;
    for (int64_t slot = start; slot < stop; slot += block) {
      block = std::min({kSlotBlock, stop - slot, latents.together(slot)});
      const bool more = slot + block < stop;
      const SlotRun<T> keys{latents.at<T>(row, slot), latents.slot_stride, rank,
                            more ? latents.at<T>(row, slot + block) : nullptr};
      const SlotRun<T> rotated{k_rope.at<T>(row, slot), k_rope.slot_stride, rope,
                               more ? k_rope.at<T>(row, slot + block) : nullptr};
      for (int64_t b = 0; b < count; ++b)
        walking[b].visit(keys, &rotated, keys, block, scale, b, count);
    }
    for (int64_t h = first; h < end; ++h) {
      const int64_t head = row * heads + h;
      findings.put(head, run, walking[(h - first) / most_heads], (h - first) % most_heads);
      if (most == 1) finish(head);
    }
  });
  if (most > 1) parallel(batch * heads, finish);
}

void ExpandedAttention::forward(const float* queries, int64_t seq, const int64_t* positions,
                                int64_t row, const Slots& latents, const Slots& k_rope,
                                float* out) const {
  if (latents.bf16)
    attend<Bf16>(queries, seq, positions, row, latents, k_rope, out);
  else
    attend<float>(queries, seq, positions, row, latents, k_rope, out);
  count_weight_bytes(expand->matrices() * expand->matrix_bytes());
}

template <typename T>
void ExpandedAttention::attend(const float* queries, int64_t seq, const int64_t* positions,
                               int64_t row, const Slots& latents, const Slots& k_rope,
                               float* out) const {
  static thread_local QuantizedRows caller_rounded;
  QuantizedRows& rounded = caller_rounded;  // the caller's, seen by all threads
  const int64_t heads = expand->matrices(), rope = k_rope.width;
  const int64_t slots = *std::max_element(positions, positions + seq) + 1;
  const Panels<T> panels(heads, 0, slots, nope + rope, expand->outputs() - nope);
  rounded.resize(*expand, slots);
  parallel_rows(slots, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> numbers;
    grow(numbers, latents.width);
    for (int64_t slot = first; slot < last; ++slot) {
      latents.get(row, slot, numbers.data());
      rounded.set_row(slot, numbers.data());
    }
  });
  const int64_t slot_blocks = (slots + kRowBlock - 1) / kRowBlock;
  for (int64_t first_head = 0; first_head < heads; first_head += panels.heads) {
    const int64_t count = std::min(panels.heads, heads - first_head);
    parallel(count * slot_blocks, [&](int64_t task) {
      const int64_t head = task / slot_blocks, first = task % slot_blocks * kRowBlock;
      const int64_t last = std::min<int64_t>(first + kRowBlock, slots);
      int32_t rows[kRowBlock];
      for (int64_t slot = first; slot < last; ++slot)
        rows[slot - first] = static_cast<int32_t>(slot);
      alignas(64) float product[kRowBlock * kTile];
      alignas(64) T stored[kRowBlock * kTile];
      for (int64_t tile = 0; tile < expand->tiles(); ++tile) {
        expand->multiply(first_head + head, tile, rounded, rows, static_cast<int>(last - first),
                         product);
        attention_loops<T>(kernels()).store(product, (last - first) * kTile, stored);
        const int64_t start = tile * kTile, end = std::min(start + kTile, expand->outputs());
        const int64_t keys = std::clamp<int64_t>(nope - start, 0, end - start);
        for (int64_t slot = first; slot < last; ++slot) {
          const T* from = stored + (slot - first) * kTile;
          panels.put_key(head, slot, start, keys, from);
          panels.put_value(head, slot, start + keys - nope, end - start - keys, from + keys);
        }
      }
      for (int64_t slot = first; slot < last; ++slot)
        panels.put_key(head, slot, nope, rope, k_rope.at<T>(row, slot));
      if (last == slots) panels.clear_edges(head);
    });
    panels.attend(queries, heads, heads, first_head, count, seq, positions, {scale}, out);
  }
}

void LatentAttention::forward(float* x, const Tokens& tokens, Half half, const Slots& latents,
                              const Slots& k_rope) const {
  static thread_local QuantizedRows caller_rounded;
  static thread_local std::vector<float> caller_down, caller_queries, caller_compressed,
      caller_mixed;
  QuantizedRows& rounded = caller_rounded;  // the caller's, seen by all threads
  const int64_t heads = absorbed->up_key->matrices(), nope = absorbed->up_key->columns();
  const int64_t rank = latents.width, value = absorbed->up_value->outputs(), count = tokens.count();
  const bool stores = half != Half::look, looks = half != Half::store;
  grow(caller_queries, count * heads * (nope + rope));
  grow(caller_compressed, count * (rank + rope));
  grow(caller_mixed, count * heads * value);
  float* queries = caller_queries.data();        // (tokens, heads, nope + rope)
  float* compressed = caller_compressed.data();  // (tokens, rank + rope)
  float* mixed = caller_mixed.data();            // (tokens, heads, v_head_dim)

  const Projection& first = query_down.weights ? query_down : query;
  if (query_down.weights) grow(caller_down, count * query_down.weights->outputs());
  round_normed(input_norm, {first.weights.get(), latent.weights.get()}, x, count, rounded);
  std::vector<Product> products;
  if (looks) products.push_back(first.to(query_down.weights ? caller_down.data() : queries));
  if (stores) products.push_back(latent.to(compressed));
  multiply_all(products, rounded, count);
  if (looks && query_down.weights) {
    round_normed(query_norm, {query.weights.get()}, caller_down.data(), count, rounded);
    multiply_all({query.to(queries)}, rounded, count);
  }

  parallel_rows(count, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> unrotated, normed;
    grow(unrotated, rope);
    grow(normed, rank);
    for (int64_t token = first; token < last; ++token) {
      const float* cosine = tokens.cosine + token * (rope / 2);
      const float* sine = tokens.sine + token * (rope / 2);
      for (int64_t head = 0; looks && head < heads; ++head) {
        float* query_rope = queries + (token * heads + head) * (nope + rope) + nope;
        std::copy_n(query_rope, rope, unrotated.data());
        rotate(unrotated.data(), cosine, sine, rope, interleave, query_rope);
      }
      if (!stores) continue;
      const int64_t row = tokens.row_of[token], slot = tokens.positions[token];
      const float* from = compressed + token * (rank + rope);
      latent_norm.forward(from, normed.data());
      latents.put(row, slot, normed.data());
      rotate(from + rank, cosine, sine, rope, interleave, unrotated.data());
      k_rope.put(row, slot, unrotated.data());
    }
  });
  if (!looks) return;

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
