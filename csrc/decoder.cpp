#include <algorithm>
#include <cmath>

#include "numbers.h"
#include "ops.h"
#include "pool.h"

namespace moescope {
namespace {

// Some of a call's tokens, as a call of their own. Rows keep their order; those without a token go.
struct Picked {
  std::vector<int64_t> ids, positions, starts{0}, row_of, table;
  std::vector<float> cosine, sine;
  int64_t singles = 0;

  Picked(const std::vector<int64_t>& picked, const int64_t* all_ids, const Tokens& all,
         const int64_t* all_table, int64_t table_width, int64_t half) {
    int64_t row = -1;
    for (int64_t token : picked) {
      if (all.row_of[token] != row) {
        row = all.row_of[token];
        table.insert(table.end(), all_table + row * table_width,
                     all_table + (row + 1) * table_width);
        starts.push_back(starts.back());
        singles += row < all.singles;
      }
      ++starts.back();
      ids.push_back(all_ids[token]);
      positions.push_back(all.positions[token]);
      row_of.push_back(static_cast<int64_t>(starts.size()) - 2);
      cosine.insert(cosine.end(), all.cosine + token * half, all.cosine + (token + 1) * half);
      sine.insert(sine.end(), all.sine + token * half, all.sine + (token + 1) * half);
    }
  }
  Tokens tokens() const {
    return {static_cast<int64_t>(starts.size()) - 1,
            singles,
            starts.data(),
            row_of.data(),
            positions.data(),
            cosine.data(),
            sine.data()};
  }
};

}  // namespace

void Rotation::at(int64_t position, float* cosine, float* sine) const {
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const float angle = static_cast<float>(position) * frequencies[i];
    cosine[i] = std::cos(angle) * factor;
    sine[i] = std::sin(angle) * factor;
  }
}

void Decoder::forward(const int64_t* ids, const int64_t* positions, int64_t rows, int64_t singles,
                      const int64_t* starts, const int64_t* table, int64_t table_width,
                      const std::vector<Slots>& keys, const std::vector<Slots>& values,
                      const std::vector<int64_t>& wanted, const Steering& steering, Chosen chosen,
                      float* out) const {
  static thread_local std::vector<float> caller_cosine, caller_sine, caller_weights;
  static thread_local std::vector<int64_t> caller_ids;
  const int64_t count = starts[rows], half = static_cast<int64_t>(rotation.frequencies.size());
  const int64_t width = embedding->columns();
  grow(caller_cosine, count * half);
  grow(caller_sine, count * half);
  float *cosine = caller_cosine.data(), *sine = caller_sine.data();
  std::vector<int64_t> row_of(count);
  for (int64_t row = 0; row < rows; ++row)
    std::fill(row_of.begin() + starts[row], row_of.begin() + starts[row + 1], row);
  const Tokens tokens{rows, singles, starts, row_of.data(), positions, cosine, sine};
  parallel_rows(count, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      float* row = out + token * width;
      embedding->take_row(ids[token], row);
      if (embedding_multiplier != 1)
        for (int64_t i = 0; i < width; ++i) row[i] *= embedding_multiplier;
      rotation.at(positions[token], cosine + token * half, sine + token * half);
    }
  });
  const bool watched = chosen.ids != nullptr;
  if (!watched) {  // what one layer chose is forgotten in the next
    chosen.slots = most_slots(steering);
    caller_ids.resize(count * chosen.slots);
    grow(caller_weights, count * chosen.slots);
    chosen.ids = caller_ids.data();
    chosen.weights = caller_weights.data();
  }
  const auto routers_of = [&](size_t layer) {
    std::vector<const Router*> routers(count, feed_forward[layer]->router.get());
    for (int64_t token = 0; !steering.set_of_row.empty() && token < count; ++token) {
      const int64_t set = steering.set_of_row[row_of[token]];
      if (set >= 0) routers[token] = steering.sets[set][layer].get();
    }
    return routers;
  };
  const size_t last = attention.size() - 1;
  for (size_t layer = 0; layer <= last; ++layer) {
    const FeedForwardBlock& block = *feed_forward[layer];
    std::vector<const Router*> routers = routers_of(layer);
    if (layer < last || static_cast<int64_t>(wanted.size()) == count) {
      attention[layer]->forward(out, tokens, Half::both, keys[layer].of_rows(table, table_width),
                                values[layer].of_rows(table, table_width));
      block.forward(out, ids, count, routers.data(), chosen);
      if (watched && block.router) chosen = chosen.from(count);
      continue;
    }
    attention[layer]->forward(out, tokens, Half::store, keys[layer].of_rows(table, table_width),
                              values[layer].of_rows(table, table_width));
    if (watched && block.router) chosen.clear(count);
    if (wanted.empty()) return;
    const Picked picked(wanted, ids, tokens, table, table_width, half);
    for (size_t i = 0; i < wanted.size(); ++i) {  // none lies before its place
      std::copy_n(out + wanted[i] * width, width, out + i * width);
      routers[i] = routers[wanted[i]];
    }
    attention[layer]->forward(out, picked.tokens(), Half::look,
                              keys[layer].of_rows(picked.table.data(), table_width),
                              values[layer].of_rows(picked.table.data(), table_width));
    block.forward(out, picked.ids.data(), static_cast<int64_t>(wanted.size()), routers.data(),
                  chosen);
    if (watched && block.router)
      for (size_t i = wanted.size(); i-- > 0;) chosen.move(i, wanted[i]);
  }
}

int64_t Decoder::sparse_layers() const {
  return std::count_if(feed_forward.begin(), feed_forward.end(),
                       [](const auto& block) { return block->router != nullptr; });
}

int64_t Decoder::most_slots(const Steering& steering) const {
  int64_t most = 0;
  for (size_t layer = 0; layer < feed_forward.size(); ++layer) {
    if (!feed_forward[layer]->router) continue;
    most = std::max(most, feed_forward[layer]->router->top_k);
    for (const Routers& set : steering.sets) most = std::max(most, set[layer]->top_k);
  }
  return most;
}

}  // namespace moescope
