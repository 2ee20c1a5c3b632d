// Experts, routers, and all layers in one call, for Python.
#include <algorithm>
#include <string>
#include <utility>

#include "bindings.h"

namespace moescope {
namespace {

Experts experts_of(const SharedWeights& gate, const SharedWeights& up, const SharedWeights& down) {
  require((gate && up && down) || (!gate && !up && !down), "experts need gate, up and down");
  return {gate, up, down};
}

void make_feed_forward(FeedForward* self, const SharedWeights& gate, const SharedWeights& up,
                       const SharedWeights& down, const SharedWeights& shared_gate,
                       const SharedWeights& shared_up, const SharedWeights& shared_down,
                       const std::optional<Floats<2>>& gate_bias,
                       const std::optional<Floats<2>>& up_bias,
                       const std::optional<Floats<2>>& down_bias, bool swigluoai,
                       std::optional<float> limit, std::optional<float> shared_limit) {
  Experts routed = experts_of(gate, up, down);
  Experts shared = experts_of(shared_gate, shared_up, shared_down);
  const auto fits = [&](const std::optional<Floats<2>>& bias, const SharedWeights& weights) {
    return !bias || (weights && has_shape(*bias, {weights->matrices(), weights->outputs()}));
  };
  require(fits(gate_bias, gate) && fits(up_bias, up) && fits(down_bias, down),
          "the biases do not fit the experts");
  routed.gate_bias = copied(gate_bias);
  routed.up_bias = copied(up_bias);
  routed.down_bias = copied(down_bias);
  routed.activation.swigluoai = swigluoai;
  if (limit) routed.activation.limit = *limit;
  if (shared_limit) shared.activation.limit = *shared_limit;
  new (self) FeedForward(std::move(routed), std::move(shared));
}

void apply_feed_forward(const FeedForward& layer, const Floats<2>& x,
                        const std::optional<Ids<2>>& topk_ids,
                        const std::optional<Floats<2>>& topk_weights, const Output<2>& out) {
  const int64_t tokens = x.shape(0), hidden = layer.any().columns();
  const int64_t slots = topk_ids ? topk_ids->shape(1) : 0;
  require(has_shape(x, {tokens, hidden}) && has_shape(out, {tokens, hidden}) &&
              topk_ids.has_value() == topk_weights.has_value() &&
              (!topk_ids || (has_shape(*topk_ids, {tokens, slots}) &&
                             has_shape(*topk_weights, {tokens, slots}))),
          "x, topk_ids, topk_weights or out do not fit the layer");
  nb::gil_scoped_release unlocked;
  std::fill_n(out.data(), out.size(), 0.0f);
  layer.forward(x.data(), tokens, topk_ids ? topk_ids->data() : nullptr,
                topk_weights ? topk_weights->data() : nullptr, slots, out.data());
}

Scoring scoring_of(const std::string& name) {
  if (name == "softmax") return Scoring::softmax;
  if (name == "sigmoid") return Scoring::sigmoid;
  if (name == "sqrtsoftplus") return Scoring::sqrtsoftplus;
  require(name == "relu", "scores are softmax, sigmoid, sqrtsoftplus or relu");
  return Scoring::relu;
}

// Those that `experts` names, marked; empty where it names none.
std::vector<uint8_t> marked(const std::vector<int64_t>& experts, int64_t count) {
  std::vector<uint8_t> marks(experts.empty() ? 0 : count, 0);
  for (int64_t expert : experts) {
    require(expert >= 0 && expert < count, "there is no such expert");
    marks[expert] = 1;
  }
  return marks;
}

HashTable table_of(const std::optional<Ids<2>>& table, int64_t experts, int64_t top_k) {
  if (!table) return {{}, 0};
  const int64_t vocab = table->shape(0);
  require(has_shape(*table, {vocab, top_k}), "the table does not fit the router");
  for (int64_t i = 0; i < vocab * top_k; ++i)
    require(table->data()[i] >= 0 && table->data()[i] < experts, "there is no such expert");
  return {{table->data(), table->data() + vocab * top_k}, vocab};
}

// The weight stays the caller's array, which is kept alive.
std::shared_ptr<Router> make_router(const Floats<2>& weight,
                                    const std::optional<Floats<1>>& logit_bias,
                                    const std::optional<Floats<1>>& bias, int64_t top_k,
                                    int64_t groups, int64_t kept_groups, int64_t best_of_group,
                                    const std::string& scoring, bool normalise, float factor,
                                    const std::vector<int64_t>& disabled,
                                    const std::vector<int64_t>& forced,
                                    const std::optional<Ids<2>>& table) {
  const int64_t experts = weight.shape(0), hidden = weight.shape(1);
  require(experts > 0 && groups > 0 && experts % groups == 0 && kept_groups > 0 &&
              kept_groups <= groups && top_k > 0 && top_k <= experts && best_of_group > 0 &&
              (!logit_bias || has_shape(*logit_bias, {experts})) &&
              (!bias || has_shape(*bias, {experts})),
          "the parts of the router do not fit together");
  return std::make_shared<Router>(Router{{weight.data(), [weight](const float*) {}},
                                         copied(logit_bias),
                                         copied(bias),
                                         marked(disabled, experts),
                                         marked(forced, experts),
                                         table_of(table, experts, top_k),
                                         experts,
                                         hidden,
                                         top_k,
                                         groups,
                                         kept_groups,
                                         best_of_group,
                                         scoring_of(scoring),
                                         normalise,
                                         factor});
}

void apply_router(const Router& router, const Floats<2>& x, const std::optional<Ids<1>>& ids,
                  const MutableIds<2>& topk_ids, const Output<2>& topk_weights) {
  const int64_t tokens = x.shape(0);
  require(has_shape(x, {tokens, router.hidden}) && has_shape(topk_ids, {tokens, router.top_k}) &&
              has_shape(topk_weights, {tokens, router.top_k}) &&
              (!ids || has_shape(*ids, {tokens})) && (ids || router.table.ids.empty()),
          "x, ids, topk_ids or topk_weights do not fit the router");
  for (int64_t token = 0; !router.table.ids.empty() && token < tokens; ++token)
    require(ids->data()[token] >= 0 && ids->data()[token] < router.table.vocab,
            "an id is not in the table");
  nb::gil_scoped_release unlocked;
  const std::vector<const Router*> routers(tokens, &router);
  if (tokens > 0)
    route(routers.data(), x.data(), ids ? ids->data() : nullptr, tokens,
          {router.top_k, topk_ids.data(), topk_weights.data(), nullptr});
}

std::shared_ptr<FeedForwardBlock> make_feed_forward_block(const Floats<1>& norm, float eps,
                                                          const std::shared_ptr<Router>& router,
                                                          const std::shared_ptr<FeedForward>& layer,
                                                          float residual_multiplier) {
  const int64_t hidden = layer->any().columns();
  require(has_shape(norm, {hidden}) && (router != nullptr) == (layer->routed_experts() > 0) &&
              (!router || (router->experts == layer->routed_experts() && router->hidden == hidden)),
          "norm, router and experts do not fit together");
  return std::make_shared<FeedForwardBlock>(
      FeedForwardBlock{norm_of(norm, eps), residual_multiplier, router, layer});
}

std::shared_ptr<Decoder> make_decoder(
    const SharedWeights& embedding, const std::vector<std::shared_ptr<Attention>>& attention,
    const std::vector<std::shared_ptr<FeedForwardBlock>>& feed_forward,
    const Floats<1>& frequencies, float rotation_factor, float embedding_multiplier) {
  require(!attention.empty() && attention.size() == feed_forward.size(),
          "every layer needs attention and a feed-forward part");
  const Attention& first = *attention.front();
  for (size_t layer = 0; layer < attention.size(); ++layer)
    require(attention[layer]->input_norm.width() == first.input_norm.width() &&
                feed_forward[layer]->norm.width() == first.input_norm.width() &&
                attention[layer]->rotated_width() == first.rotated_width(),
            "the layers do not fit together");
  require(has_shape(frequencies, {first.rotated_width() / 2}),
          "the rotation does not fit the layers");
  for (const auto& block : feed_forward)
    require(!block->router || block->router->table.ids.empty() ||
                block->router->table.vocab >= embedding->outputs(),
            "a hash router's table does not have the whole vocabulary");
  require(embedding->matrices() == 1 && embedding->columns() == first.input_norm.width(),
          "the embedding does not fit the layers");
  return std::make_shared<Decoder>(
      Decoder{embedding,
              embedding_multiplier,
              {{frequencies.data(), frequencies.data() + frequencies.size()}, rotation_factor},
              {attention.begin(), attention.end()},
              {feed_forward.begin(), feed_forward.end()}});
}

std::shared_ptr<Head> make_head(const Floats<1>& norm, float eps, const SharedWeights& weights,
                                const std::optional<Floats<1>>& bias) {
  const int64_t outputs = weights->matrices() * weights->outputs();
  require(has_shape(norm, {weights->columns()}) && (!bias || has_shape(*bias, {outputs})),
          "norm, weights and bias do not fit together");
  return std::make_shared<Head>(Head{norm_of(norm, eps), {weights, copied(bias)}});
}

void apply_head(const Head& head, const Floats<2>& states, const Output<2>& out) {
  const Weights& weights = *head.projection.weights;
  const int64_t rows = states.shape(0);
  require(has_shape(states, {rows, weights.columns()}) &&
              has_shape(out, {rows, weights.matrices() * weights.outputs()}),
          "states or out do not fit the head");
  nb::gil_scoped_release unlocked;
  head.forward(states.data(), rows, out.data());
}

// Every layer's slots, which it keeps alive, so that a call need not hand over each of them.
struct CacheSlots {
  std::vector<CacheArray> key_arrays, value_arrays;
  std::vector<Slots> keys, values;
  int64_t blocks, block_slots;  // that all layers have
};

void make_cache_slots(CacheSlots* self, std::vector<CacheArray> keys,
                      std::vector<CacheArray> values) {
  require(!keys.empty() && keys.size() == values.size(), "every layer needs keys and values");
  const int64_t blocks = keys.front().shape(0), block_slots = keys.front().shape(1);
  CacheSlots made{std::move(keys), std::move(values), {}, {}, blocks, block_slots};
  for (const auto& [arrays, held] :
       {std::pair{&made.key_arrays, &made.keys}, std::pair{&made.value_arrays, &made.values}})
    for (const CacheArray& array : *arrays) {
      require(has_shape(array, {blocks, block_slots}) &&
                  array.dtype() == made.key_arrays.front().dtype() &&
                  (array.stride(2) == 1 || array.shape(2) == 1),
              "the layers' slots do not fit together");
      held->push_back(slots_of(array));
    }
  new (self) CacheSlots(std::move(made));
}

// Other routers for some rows, as far as they fit the network.
Steering steering_of(const Decoder& decoder, const std::vector<Routers>& sets,
                     const std::vector<int64_t>& set_of_row, int64_t rows) {
  for (const Routers& set : sets) {
    require(set.size() == decoder.feed_forward.size(), "every layer needs its routers");
    for (size_t layer = 0; layer < set.size(); ++layer) {
      const Router *own = decoder.feed_forward[layer]->router.get(), *other = set[layer].get();
      require((own == nullptr) == (other == nullptr) &&
                  (!own || (other->experts == own->experts && other->hidden == own->hidden &&
                            other->table.ids.empty())),
              "the routers do not fit the network");
    }
  }
  require(set_of_row.empty() || static_cast<int64_t>(set_of_row.size()) == rows,
          "every row needs routers");
  for (int64_t set : set_of_row)
    require(set >= -1 && set < static_cast<int64_t>(sets.size()), "there are no such routers");
  return {sets, set_of_row};
}

int64_t slots_of_decoder(const Decoder& decoder, const std::vector<Routers>& sets) {
  return decoder.most_slots(steering_of(decoder, sets, {}, 0));
}

// A call's tokens and rows as lists, which cross sooner than arrays of a few numbers do.
void apply_decoder(const Decoder& decoder, const std::vector<int64_t>& ids,
                   const std::vector<int64_t>& positions, const std::vector<int64_t>& starts,
                   int64_t singles, const std::vector<std::vector<int64_t>>& tables,
                   const CacheSlots& cache, const std::vector<Routers>& sets,
                   const std::vector<int64_t>& set_of_row, const std::vector<int64_t>& wanted,
                   const std::optional<MutableIds<3>>& topk_ids,
                   const std::optional<Output<3>>& topk_weights,
                   const std::optional<Output<3>>& topk_scores, const Output<2>& out) {
  const int64_t count = ids.size(), rows = tables.size(), width = rows ? tables[0].size() : 0;
  require(has_shape(out, {count, decoder.embedding->columns()}) &&
              static_cast<int64_t>(positions.size()) == count &&
              static_cast<int64_t>(starts.size()) == rows + 1 && count > 0 && singles >= 0 &&
              singles <= rows && cache.keys.size() == decoder.attention.size(),
          "ids, positions, starts, tables, cache or out do not fit the network");
  for (size_t layer = 0; layer < cache.keys.size(); ++layer)
    require(cache.keys[layer].width == decoder.attention[layer]->key_width() &&
                cache.values[layer].width == decoder.attention[layer]->value_width(),
            "a layer's cache does not fit the network");
  require(starts[0] == 0 && starts[rows] == count, "the rows are not all tokens");
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = starts[row], end = starts[row + 1];
    require(first < end && end <= count && (row >= singles || end == first + 1),
            "a row has too few or many tokens");
    for (int64_t token = first; token < end; ++token)
      require(positions[token] >= 0 && positions[token] < width * cache.block_slots,
              "a position is not in the cache");
  }
  std::vector<int64_t> table;
  for (const std::vector<int64_t>& blocks : tables) {
    require(static_cast<int64_t>(blocks.size()) == width, "rows have tables of unequal length");
    for (int64_t block : blocks)
      require(block >= 0 && block < cache.blocks, "a row names a block that there is not");
    table.insert(table.end(), blocks.begin(), blocks.end());
  }
  for (int64_t id : ids)
    require(id >= 0 && id < decoder.embedding->outputs(), "an id is not in the vocabulary");
  for (size_t i = 0; i < wanted.size(); ++i)
    require(wanted[i] > (i ? wanted[i - 1] : -1) && wanted[i] < count,
            "wanted tokens are not in order, or not there");
  const Steering steering = steering_of(decoder, sets, set_of_row, rows);
  const int64_t slots = decoder.most_slots(steering), sparse = decoder.sparse_layers();
  Chosen chosen{};
  std::vector<float> weights;  // that nobody asks for
  if (topk_ids && sparse) {
    const auto fits = [&](const auto& array) { return has_shape(array, {sparse, count, slots}); };
    require(fits(*topk_ids) && (!topk_weights || fits(*topk_weights)) &&
                (!topk_scores || fits(*topk_scores)),
            "topk_ids, topk_weights or topk_scores do not fit the network");
    if (!topk_weights) weights.resize(sparse * count * slots);
    chosen = {slots, topk_ids->data(), topk_weights ? topk_weights->data() : weights.data(),
              topk_scores ? topk_scores->data() : nullptr};
  }
  nb::gil_scoped_release unlocked;
  decoder.forward(ids.data(), positions.data(), rows, singles, starts.data(), table.data(), width,
                  cache.keys, cache.values, wanted, steering, chosen, out.data());
}

}  // namespace

void bind_layers(nb::module_& m) {
  nb::class_<FeedForward>(m, "FeedForward")
      .def("__deepcopy__", &same)
      .def("__init__", &make_feed_forward, "gate"_a.none(), "up"_a.none(), "down"_a.none(),
           "shared_gate"_a.none(), "shared_up"_a.none(), "shared_down"_a.none(),
           "gate_bias"_a.none(), "up_bias"_a.none(), "down_bias"_a.none(), "swigluoai"_a,
           "limit"_a.none(), "shared_limit"_a.none())
      .def("__call__", &apply_feed_forward, "x"_a, "topk_ids"_a.none(), "topk_weights"_a.none(),
           "out"_a);
  nb::class_<Router>(m, "Router")
      .def("__deepcopy__", &same)
      .def("__call__", &apply_router, "x"_a, "ids"_a.none(), "topk_ids"_a, "topk_weights"_a);
  m.def("router", &make_router, "weight"_a, "logit_bias"_a.none(), "bias"_a.none(), "top_k"_a,
        "groups"_a, "kept_groups"_a, "best_of_group"_a, "scoring"_a, "normalise"_a, "factor"_a,
        "disabled"_a, "forced"_a, "table"_a.none());
  nb::class_<FeedForwardBlock>(m, "FeedForwardBlock").def("__deepcopy__", &same);
  m.def("feed_forward_block", &make_feed_forward_block, "norm"_a, "eps"_a, "router"_a.none(),
        "layer"_a, "residual_multiplier"_a);
  nb::class_<Decoder>(m, "Decoder")
      .def("__deepcopy__", &same)
      .def("__call__", &apply_decoder, "ids"_a, "positions"_a, "starts"_a, "singles"_a, "tables"_a,
           "cache"_a, "sets"_a, "set_of_row"_a, "wanted"_a, "topk_ids"_a.none(),
           "topk_weights"_a.none(), "topk_scores"_a.none(), "out"_a)
      .def("most_slots", &slots_of_decoder, "sets"_a);
  m.def("decoder", &make_decoder, "embedding"_a, "attention"_a, "feed_forward"_a, "frequencies"_a,
        "rotation_factor"_a, "embedding_multiplier"_a);
  nb::class_<Head>(m, "Head")
      .def("__deepcopy__", &same)
      .def("__call__", &apply_head, "states"_a, "out"_a);
  m.def("head", &make_head, "norm"_a, "eps"_a, "weights"_a, "bias"_a.none());
  nb::class_<CacheSlots>(m, "CacheSlots").def("__init__", &make_cache_slots, "keys"_a, "values"_a);
}

}  // namespace moescope
