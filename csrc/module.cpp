// The Python module `moescope.kernels._native`: checks shapes, lets go of the interpreter's lock,
// and calls what ops.h declares. Arrays cross as DLPack, so no PyTorch is needed to build this.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "expert_memory.h"
#include "file.h"
#include "ops.h"
#include "pool.h"
#include "quantize.h"
#include "settling.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace moescope;

namespace {

template <int Dimensions>
using Floats = nb::ndarray<const float, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <int Dimensions>
using Output = nb::ndarray<float, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <int Dimensions>
using Ids = nb::ndarray<const int64_t, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <int Dimensions>
using MutableIds = nb::ndarray<int64_t, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
// Rows of any number of axes, whose last is their width.
using FloatRows = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using OutputRows = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using CacheArray = nb::ndarray<nb::ndim<3>, nb::device::cpu>;  // bf16 or float32
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrices = nb::ndarray<nb::ro, nb::ndim<3>, nb::device::cpu>;
using SharedWeights = std::shared_ptr<Weights>;

void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

template <typename Array>
bool has_shape(const Array& array, std::initializer_list<int64_t> shape) {
  size_t axis = 0;
  for (int64_t size : shape)
    if (static_cast<int64_t>(array.shape(axis++)) != size) return false;
  return true;
}

bool is_bf16(const nb::dlpack::dtype& type) {
  return type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16;
}

SharedWeights pack(const Matrices& matrices, const std::string& format,
                   const std::optional<Floats<1>>& importance) {
  const int kind = format_of(format);
  const bool bf16 = is_bf16(matrices.dtype());
  require(bf16 || matrices.dtype() == nb::dtype<float>(), "weights must be float32 or bfloat16");
  require(matrices.size() > 0, "there are no weights");
  require(matrices.shape(2) == 1 || matrices.stride(2) == 1, "columns must lie side by side");
  const int64_t count = matrices.shape(0), outputs = matrices.shape(1), columns = matrices.shape(2);
  require(!importance || has_shape(*importance, {columns}), "a column has one importance");
  const Source source{matrices.data(), bf16, matrices.stride(0), matrices.stride(1),
                      importance ? importance->data() : nullptr};
  nb::gil_scoped_release unlocked;
  return std::make_shared<Weights>(kind, count, outputs, columns, source);
}

void quantize_blocks(const Floats<2>& rows, const std::string& name,
                     const nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>& out) {
  const BlockType type = block_type_of(name);
  const auto [weights, bytes] = shape_of(type);
  const int64_t count = rows.shape(0), columns = rows.shape(1);
  require(columns % weights == 0, "rows must be whole blocks");
  require(has_shape(out, {count, columns / weights * bytes}), "out has another size");
  nb::gil_scoped_release unlocked;
  quantize(type, rows.data(), count, columns, out.data());
}

SharedWeights pack_blocks(const Bytes& blocks, const std::string& type, int64_t matrices,
                          int64_t outputs, int64_t columns) {
  const GgufType& of = gguf_type(type);
  const int64_t of_row = (columns + of.columns - 1) / of.columns;
  require(matrices > 0 && outputs > 0 && columns > 0 &&
              (columns % of.columns == 0 || of.read == nullptr) &&
              static_cast<int64_t>(blocks.size()) == matrices * outputs * of_row * of.bytes,
          "blocks of this shape are not of this size");
  nb::gil_scoped_release unlocked;
  return std::make_shared<Weights>(of, matrices, outputs, columns, blocks.data());
}

SharedWeights empty_weights(const std::string& format, int64_t matrices, int64_t outputs,
                            int64_t columns) {
  require(matrices > 0 && outputs > 0 && columns > 0, "there are no weights");
  return std::make_shared<Weights>(format_of(format), matrices, outputs, columns);
}

uint64_t checksum_of(const Bytes& data) {
  nb::gil_scoped_release unlocked;
  return checksum(data.data(), data.size());
}

std::pair<SharedWeights, uint64_t> read_weights(int descriptor, uint64_t offset, uint64_t bytes,
                                                const std::string& format, int64_t matrices,
                                                int64_t outputs, int64_t columns) {
  const int kind = format_of(format);
  require(matrices > 0 && outputs > 0 && columns > 0, "there are no weights");
  nb::gil_scoped_release unlocked;
  const auto weights = std::make_shared<Weights>(kind, matrices, outputs, columns);
  Buffer& stored = weights->stored();
  require(stored.size() == bytes, "weights of this shape are not of this size");
  stored.fill(descriptor, offset);
  settle_later(weights);
  return {weights, checksum(stored.data(), bytes)};
}

// Experts' matrices that stay in their file until a token visits them.
SharedWeights stream_weights(int descriptor, uint64_t offset, uint64_t bytes,
                             const std::string& format, int64_t matrices, int64_t outputs,
                             int64_t columns) {
  const int kind = format_of(format);
  require(matrices > 0 && outputs > 0 && columns > 0, "there are no weights");
  nb::gil_scoped_release unlocked;
  const auto weights = std::make_shared<Weights>(kind, matrices, outputs, columns);
  Buffer& stored = weights->stored();
  require(stored.size() == bytes, "weights of this shape are not of this size");
  if (!stored.stream(descriptor, offset, matrices * weights->matrix_bytes()))
    stored.fill(descriptor, offset);
  return weights;
}

// A view, which keeps the weights alive.
nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>> stored_bytes(const SharedWeights& weights) {
  const Buffer& stored = weights->stored();
  return {stored.data(), {stored.size()}, nb::cast(weights)};
}

void unpack(const Weights& weights, const Output<3>& out) {
  require(has_shape(out, {weights.matrices(), weights.outputs(), weights.columns()}),
          "out has another shape than the weights");
  weights.unpack(out.data());
}

template <typename Array>
int64_t width_of(const Array& rows) {
  require(rows.ndim() > 0, "a number is no row");
  return static_cast<int64_t>(rows.shape(rows.ndim() - 1));
}

template <typename Array>
int64_t rows_of(const Array& rows) {
  int64_t count = 1;
  for (size_t axis = 0; axis + 1 < rows.ndim(); ++axis) count *= rows.shape(axis);
  return count;
}

void apply_linear(const Weights& weights, const FloatRows& x, const std::optional<Floats<1>>& bias,
                  const OutputRows& out) {
  const int64_t rows = rows_of(x);
  const int64_t outputs = weights.matrices() * weights.outputs();
  require(width_of(x) == weights.columns() && width_of(out) == outputs && rows_of(out) == rows &&
              (!bias || has_shape(*bias, {outputs})),
          "x, bias or out do not fit the weights");
  nb::gil_scoped_release unlocked;
  linear(weights, x.data(), rows, bias ? bias->data() : nullptr, out.data());
}

void take_rows(const Weights& weights, const Ids<1>& ids, const Output<2>& out) {
  require(weights.matrices() == 1 &&
              has_shape(out, {static_cast<int64_t>(ids.shape(0)), weights.columns()}),
          "out does not fit the weights");
  for (size_t at = 0; at < ids.shape(0); ++at)
    require(ids.data()[at] >= 0 && ids.data()[at] < weights.outputs(), "there is no such row");
  nb::gil_scoped_release unlocked;
  parallel_rows(static_cast<int64_t>(ids.shape(0)), [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at)
      weights.take_row(ids.data()[at], out.data() + at * weights.columns());
  });
}

// Weights never change, so that a copy of a network shares them.
nb::object same(nb::object self, nb::handle) { return self; }

template <typename Array>
std::vector<float> copied(const std::optional<Array>& array) {
  if (!array) return {};
  return {array->data(), array->data() + array->size()};
}

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

Slots slots_of(const CacheArray& array) {
  const bool bf16 = is_bf16(array.dtype());
  require(bf16 || array.dtype() == nb::dtype<float>(), "a cache holds bf16 or float32");
  return {array.data(),
          bf16,
          array.stride(0),
          array.stride(1),
          static_cast<int64_t>(array.shape(2)),
          static_cast<int64_t>(array.shape(1))};
}

void apply_attention(const AbsorbedAttention& attention, const Floats<3>& q_nope,
                     const Floats<3>& q_rope, const CacheArray& latents, const CacheArray& k_rope,
                     const Ids<1>& lengths, const Output<3>& out) {
  const Weights &up_key = *attention.up_key, &up_value = *attention.up_value;
  const int64_t batch = q_nope.shape(0), heads = up_key.matrices(), nope = up_key.columns();
  const int64_t slots = latents.shape(1), rope = k_rope.shape(2);
  require(has_shape(q_nope, {batch, heads, nope}) && has_shape(q_rope, {batch, heads, rope}) &&
              has_shape(latents, {batch, slots, up_key.outputs()}) &&
              has_shape(k_rope, {batch, slots, rope}) && has_shape(lengths, {batch}) &&
              has_shape(out, {batch, heads, up_value.outputs()}),
          "queries, cache or out do not fit the attention");
  require(latents.dtype() == k_rope.dtype() && (latents.stride(2) == 1 || latents.shape(2) == 1) &&
              (k_rope.stride(2) == 1 || k_rope.shape(2) == 1),
          "the numbers of a slot must lie side by side");
  for (int64_t row = 0; row < batch; ++row)
    require(lengths.data()[row] >= 1 && lengths.data()[row] <= slots,
            "a length is not in the cache");
  nb::gil_scoped_release unlocked;
  std::vector<int64_t> table(batch);  // each row is a block
  std::iota(table.begin(), table.end(), 0);
  attention.forward({q_nope.data(), q_rope.data(), nope, rope},
                    slots_of(latents).of_rows(table.data(), 1),
                    slots_of(k_rope).of_rows(table.data(), 1), lengths.data(), batch, out.data());
}

// --- half a layer, and all layers, in one call ---

Norm norm_of(const std::optional<Floats<1>>& weight, float eps) { return {copied(weight), eps}; }

std::shared_ptr<LatentAttention> make_latent_attention(
    const Floats<1>& input_norm, float eps, const SharedWeights& query_down,
    const std::optional<Floats<1>>& query_down_bias, const std::optional<Floats<1>>& query_norm,
    const SharedWeights& query, const SharedWeights& latent,
    const std::optional<Floats<1>>& latent_bias, const Floats<1>& latent_norm, float latent_eps,
    const std::shared_ptr<AbsorbedAttention>& absorbed, const SharedWeights& expand,
    const SharedWeights& output, const std::optional<Floats<1>>& output_bias, bool interleave,
    float residual_multiplier) {
  const int64_t hidden = input_norm.shape(0), rank = absorbed->up_key->outputs();
  const int64_t heads = absorbed->up_key->matrices(), nope = absorbed->up_key->columns();
  const int64_t rope = latent->outputs() - rank, value = absorbed->up_value->outputs();
  const bool low_rank = query_down != nullptr;
  require(rope > 0 && rope % 2 == 0 && latent->columns() == hidden &&
              query->outputs() == heads * (nope + rope) &&
              (low_rank
                   ? query_down->columns() == hidden && query_down->outputs() == query->columns() &&
                         query_norm && has_shape(*query_norm, {query->columns()})
                   : query->columns() == hidden) &&
              has_shape(latent_norm, {rank}) && expand->matrices() == heads &&
              expand->outputs() == nope + value && expand->columns() == rank &&
              output->outputs() == hidden && output->columns() == heads * value &&
              (!query_down_bias || has_shape(*query_down_bias, {query->columns()})) &&
              (!latent_bias || has_shape(*latent_bias, {rank + rope})) &&
              (!output_bias || has_shape(*output_bias, {hidden})),
          "the parts of the attention do not fit together");
  const auto made = std::make_shared<LatentAttention>();
  made->input_norm = norm_of(input_norm, eps);
  made->query_norm = norm_of(query_norm, latent_eps);
  made->latent_norm = norm_of(latent_norm, latent_eps);
  made->query_down = {query_down, copied(query_down_bias)};
  made->query = {query, {}};
  made->latent = {latent, copied(latent_bias)};
  made->output = {output, copied(output_bias)};
  made->absorbed = absorbed;
  made->expanded =
      std::make_shared<ExpandedAttention>(ExpandedAttention{expand, nope, absorbed->scale});
  made->rope = rope;
  made->interleave = interleave;
  made->residual_multiplier = residual_multiplier;
  return made;
}

std::shared_ptr<GroupedAttention> make_grouped_attention(
    const Floats<1>& input_norm, float eps, const SharedWeights& query,
    const std::optional<Floats<1>>& query_bias, const SharedWeights& key,
    const std::optional<Floats<1>>& key_bias, const SharedWeights& value,
    const std::optional<Floats<1>>& value_bias, const SharedWeights& output,
    const std::optional<Floats<1>>& output_bias, int64_t heads, int64_t kv_heads, float scale,
    const std::optional<Floats<1>>& query_norm, const std::optional<Floats<1>>& key_norm,
    int64_t rope, bool interleave, std::optional<float> clip, std::optional<int64_t> window,
    const std::optional<Floats<1>>& sinks, float residual_multiplier) {
  const int64_t hidden = input_norm.shape(0);
  require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && query->outputs() % heads == 0,
          "the heads do not fit the query");
  const int64_t width = query->outputs() / heads;
  const auto normalises = [](const std::optional<Floats<1>>& norm, int64_t heads, int64_t width) {
    return !norm || has_shape(*norm, {width}) || has_shape(*norm, {heads * width});
  };
  require(rope > 0 && rope % 2 == 0 && rope <= width && query->columns() == hidden &&
              key->columns() == hidden && value->columns() == hidden &&
              key->outputs() == kv_heads * width && value->outputs() == kv_heads * width &&
              output->columns() == heads * width && output->outputs() == hidden &&
              (!query_bias || has_shape(*query_bias, {query->outputs()})) &&
              (!key_bias || has_shape(*key_bias, {key->outputs()})) &&
              (!value_bias || has_shape(*value_bias, {value->outputs()})) &&
              (!output_bias || has_shape(*output_bias, {hidden})) &&
              normalises(query_norm, heads, width) && normalises(key_norm, kv_heads, width) &&
              (!window || *window > 0) && (!sinks || has_shape(*sinks, {heads})),
          "the parts of the attention do not fit together");
  const auto made = std::make_shared<GroupedAttention>();
  made->input_norm = norm_of(input_norm, eps);
  made->query = {query, copied(query_bias)};
  made->key = {key, copied(key_bias)};
  made->value = {value, copied(value_bias)};
  made->output = {output, copied(output_bias)};
  made->heads = heads;
  made->kv_heads = kv_heads;
  made->width = width;
  made->scale = scale;
  made->query_norm = norm_of(query_norm, eps);
  made->key_norm = norm_of(key_norm, eps);
  made->rope = rope;
  made->interleave = interleave;
  if (clip) made->clip = *clip;
  if (window) made->window = *window;
  made->sinks = copied(sinks);
  made->residual_multiplier = residual_multiplier;
  return made;
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

void apply_decoder(const Decoder& decoder, const Ids<1>& ids, const Ids<1>& positions,
                   const Ids<1>& starts, int64_t singles, const Ids<2>& table,
                   const CacheSlots& cache, const std::vector<Routers>& sets,
                   const std::vector<int64_t>& set_of_row,
                   const std::optional<MutableIds<3>>& topk_ids,
                   const std::optional<Output<3>>& topk_weights,
                   const std::optional<Output<3>>& topk_scores, const Output<2>& out) {
  const int64_t count = ids.shape(0), rows = table.shape(0), width = table.shape(1);
  require(has_shape(out, {count, decoder.embedding->columns()}) && has_shape(positions, {count}) &&
              has_shape(starts, {rows + 1}) && count > 0 && singles >= 0 && singles <= rows &&
              cache.keys.size() == decoder.attention.size(),
          "ids, positions, starts, table, cache or out do not fit the network");
  for (size_t layer = 0; layer < cache.keys.size(); ++layer)
    require(cache.keys[layer].width == decoder.attention[layer]->key_width() &&
                cache.values[layer].width == decoder.attention[layer]->value_width(),
            "a layer's cache does not fit the network");
  require(starts.data()[0] == 0 && starts.data()[rows] == count, "the rows are not all tokens");
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = starts.data()[row], end = starts.data()[row + 1];
    require(first < end && (row >= singles || end == first + 1),
            "a row has too few or many tokens");
    for (int64_t token = first; token < end; ++token) {
      const int64_t position = positions.data()[token];
      require(position >= 0 && position < width * cache.block_slots,
              "a position is not in the cache");
    }
  }
  for (int64_t entry = 0; entry < rows * width; ++entry)
    require(table.data()[entry] >= 0 && table.data()[entry] < cache.blocks,
            "a row names a block that there is not");
  for (int64_t token = 0; token < count; ++token)
    require(ids.data()[token] >= 0 && ids.data()[token] < decoder.embedding->outputs(),
            "an id is not in the vocabulary");
  const Steering steering = steering_of(decoder, sets, set_of_row, rows);
  const int64_t slots = decoder.most_slots(steering), sparse = decoder.sparse_layers();
  Chosen chosen{};
  if (topk_ids && sparse) {
    require(topk_weights && topk_scores && has_shape(*topk_ids, {sparse, count, slots}) &&
                has_shape(*topk_weights, {sparse, count, slots}) &&
                has_shape(*topk_scores, {sparse, count, slots}),
            "topk_ids, topk_weights or topk_scores do not fit the network");
    chosen = {slots, topk_ids->data(), topk_weights->data(), topk_scores->data()};
  }
  nb::gil_scoped_release unlocked;
  decoder.forward(ids.data(), positions.data(), rows, singles, starts.data(), table.data(), width,
                  cache.keys, cache.values, steering, chosen, out.data());
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

void apply_likeliest(const Floats<2>& logits, const MutableIds<2>& ids, const Output<2>& values) {
  const int64_t rows = logits.shape(0), vocab = logits.shape(1), count = ids.shape(1);
  require(has_shape(ids, {rows, count}) && has_shape(values, {rows, count}) && count > 0 &&
              count <= vocab,
          "ids or values do not fit the logits");
  nb::gil_scoped_release unlocked;
  likeliest(logits.data(), rows, vocab, count, ids.data(), values.data());
}

void apply_log_sums(const Floats<2>& logits, float scale, const Output<1>& out) {
  const int64_t rows = logits.shape(0), vocab = logits.shape(1);
  require(has_shape(out, {rows}) && vocab > 0, "out does not fit the logits");
  nb::gil_scoped_release unlocked;
  log_sums(logits.data(), rows, vocab, scale, out.data());
}

void apply_rms_norm(const FloatRows& x, const Floats<1>& weight, float eps, const OutputRows& out) {
  const int64_t rows = rows_of(x), width = width_of(x);
  require(has_shape(weight, {width}) && width_of(out) == width && rows_of(out) == rows && width > 0,
          "weight or out do not fit x");
  nb::gil_scoped_release unlocked;
  parallel_rows(rows, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      kernels().rms_norm(x.data() + row * width, weight.data(), eps, width,
                         out.data() + row * width);
  });
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a model that a script holds to its end is no leak

  m.def("instruction_set", [] { return kernels().name; });
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Kernels* set : available_kernels()) names.push_back(set->name);
    return names;
  });
  m.def("use_instruction_set", &use_kernels, "name"_a);
  m.def("threads", &threads);
  m.def("set_threads", &set_threads, "count"_a);
  m.def("weight_bytes_read", &weight_bytes_read);
  m.def("rms_norm", &apply_rms_norm, "x"_a, "weight"_a, "eps"_a, "out"_a);

  nb::class_<ReadProbe>(m, "ReadProbe")
      .def(
          "__init__",
          [](ReadProbe* self, int64_t size, bool huge_pages) {
            require(size > 0, "the size must be positive");
            new (self) ReadProbe(size, huge_pages ? Pages::huge : Pages::small);
          },
          "bytes"_a, "huge_pages"_a)
      .def("read", &ReadProbe::read, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Weights>(m, "Weights")
      .def_prop_ro("matrix_bytes", &Weights::matrix_bytes)
      .def_prop_ro("format", [](const Weights& weights) { return weights.format().name; })
      .def("rows", &take_rows, "ids"_a, "out"_a)
      .def("put", &Weights::put, "matrix"_a, "one"_a)
      .def_prop_ro("stored", &stored_bytes)
      .def("__deepcopy__", &same)
      .def("unpack", &unpack, "out"_a)
      .def("linear", &apply_linear, "x"_a, "bias"_a.none(), "out"_a);
  m.def("pack", &pack, "matrices"_a, "format"_a, "importance"_a.none());
  m.def("quantize_blocks", &quantize_blocks, "rows"_a, "type"_a, "out"_a);
  m.def("pack_blocks", &pack_blocks, "blocks"_a, "type"_a, "matrices"_a, "outputs"_a, "columns"_a);
  m.def("empty_weights", &empty_weights, "format"_a, "matrices"_a, "outputs"_a, "columns"_a);
  m.def("layout", &Weights::layout);
  m.def("checksum", &checksum_of, "data"_a);
  m.def("read_weights", &read_weights, "descriptor"_a, "offset"_a, "bytes"_a, "format"_a,
        "matrices"_a, "outputs"_a, "columns"_a);
  m.def("stream_weights", &stream_weights, "descriptor"_a, "offset"_a, "bytes"_a, "format"_a,
        "matrices"_a, "outputs"_a, "columns"_a);
  m.def("limit_experts", [](int64_t bytes) { expert_memory().limit(bytes); }, "bytes"_a);
  m.def("expert_counts", [] {
    const ExpertCounts counts = expert_memory().counts();
    return std::vector<int64_t>{counts.visits, counts.hits, counts.bytes_read, counts.held,
                                counts.limit};
  });
  m.def("settle", &settle);
  m.def("unsettled", &unsettled);

  nb::class_<FeedForward>(m, "FeedForward")
      .def("__deepcopy__", &same)
      .def("__init__", &make_feed_forward, "gate"_a.none(), "up"_a.none(), "down"_a.none(),
           "shared_gate"_a.none(), "shared_up"_a.none(), "shared_down"_a.none(),
           "gate_bias"_a.none(), "up_bias"_a.none(), "down_bias"_a.none(), "swigluoai"_a,
           "limit"_a.none(), "shared_limit"_a.none())
      .def("__call__", &apply_feed_forward, "x"_a, "topk_ids"_a.none(), "topk_weights"_a.none(),
           "out"_a);

  nb::class_<AbsorbedAttention>(m, "AbsorbedAttention")
      .def("__deepcopy__", &same)
      .def(
          "__init__",
          [](AbsorbedAttention* self, SharedWeights up_key, SharedWeights up_value, float scale) {
            require(up_key->matrices() == up_value->matrices() &&
                        up_key->outputs() == up_value->columns(),
                    "up_key and up_value do not fit together");
            new (self) AbsorbedAttention{up_key, up_value, scale};
          },
          "up_key"_a, "up_value"_a, "scale"_a)
      .def_prop_ro("weight_bytes",
                   [](const AbsorbedAttention& self) {
                     return self.up_key->matrices() *
                            (self.up_key->matrix_bytes() + self.up_value->matrix_bytes());
                   })
      .def("__call__", &apply_attention, "q_nope"_a, "q_rope"_a, "latents"_a, "k_rope"_a,
           "lengths"_a, "out"_a);

  nb::class_<Attention>(m, "Attention").def("__deepcopy__", &same);
  nb::class_<LatentAttention, Attention>(m, "LatentAttention");
  nb::class_<GroupedAttention, Attention>(m, "GroupedAttention");
  m.def("latent_attention", &make_latent_attention, "input_norm"_a, "eps"_a, "query_down"_a.none(),
        "query_down_bias"_a.none(), "query_norm"_a.none(), "query"_a, "latent"_a,
        "latent_bias"_a.none(), "latent_norm"_a, "latent_eps"_a, "absorbed"_a, "expand"_a,
        "output"_a, "output_bias"_a.none(), "interleave"_a, "residual_multiplier"_a);
  m.def("grouped_attention", &make_grouped_attention, "input_norm"_a, "eps"_a, "query"_a,
        "query_bias"_a.none(), "key"_a, "key_bias"_a.none(), "value"_a, "value_bias"_a.none(),
        "output"_a, "output_bias"_a.none(), "heads"_a, "kv_heads"_a, "scale"_a,
        "query_norm"_a.none(), "key_norm"_a.none(), "rope"_a, "interleave"_a, "clip"_a.none(),
        "window"_a.none(), "sinks"_a.none(), "residual_multiplier"_a);
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
      .def("__call__", &apply_decoder, "ids"_a, "positions"_a, "starts"_a, "singles"_a, "table"_a,
           "cache"_a, "sets"_a, "set_of_row"_a, "topk_ids"_a.none(), "topk_weights"_a.none(),
           "topk_scores"_a.none(), "out"_a)
      .def("most_slots", &slots_of_decoder, "sets"_a);
  m.def("decoder", &make_decoder, "embedding"_a, "attention"_a, "feed_forward"_a, "frequencies"_a,
        "rotation_factor"_a, "embedding_multiplier"_a);
  nb::class_<CacheSlots>(m, "CacheSlots").def("__init__", &make_cache_slots, "keys"_a, "values"_a);
  m.def("likeliest", &apply_likeliest, "logits"_a, "ids"_a, "values"_a);
  m.def("log_sums", &apply_log_sums, "logits"_a, "scale"_a, "out"_a);
}
