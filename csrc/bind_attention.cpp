// Attention for Python, of both kinds.
#include <numeric>
#include <utility>

#include "bindings.h"

namespace moescope {
namespace {

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

}  // namespace

void bind_attention(nb::module_& m) {
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
}

}  // namespace moescope
