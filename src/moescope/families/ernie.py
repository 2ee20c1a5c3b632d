"""ERNIE 4.5 (Baidu): softmax scores, chosen with a bias, and shared experts."""

from moescope.config import ModelConfig
from moescope.families.dialect import layer_types, plain, renamed
from moescope.families.family import Family, Fields, Gguf, Metadata, Tensors

BIAS = "mlp.moe_statics.e_score_correction_bias"
NAMES = {
    "moe_num_experts": "n_routed_experts",
    "moe_num_shared_experts": "n_shared_experts",
    "moe_k": "num_experts_per_tok",
}
DEFAULTS: Fields = {
    "n_shared_experts": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}


def _read(fields: Fields) -> Fields:
    layers = fields.get("num_hidden_layers", 0)
    start, step = fields.get("moe_layer_start_index", 1), fields.get("moe_layer_interval") or 1
    end = fields.get("moe_layer_end_index", -1)
    end = layers - 1 if end in (None, -1) else end
    mixed = [start <= layer <= end and (layer + 1) % step == 0 for layer in range(layers)]
    read = DEFAULTS | renamed(plain(fields, theta=5e5), NAMES)
    read |= layer_types([not is_mixed for is_mixed in mixed])
    return read | {"rope_interleave": True, "attention_bias": bool(fields.get("use_bias"))}


def _write(config: ModelConfig) -> Fields:
    kinds = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]
    first = kinds.index(True) if True in kinds else len(kinds)
    return {
        "moe_num_experts": config.n_routed_experts,
        "moe_num_shared_experts": config.n_shared_experts,
        "moe_k": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "moe_layer_start_index": first,
        "moe_layer_end_index": len(kinds) - 1 - kinds[::-1].index(True) if True in kinds else -1,
        "moe_layer_interval": 1,
        "use_bias": config.attention_bias,
    }


def _read_gguf(metadata: Metadata) -> Fields:
    return {
        "model_type": "ernie4_5_moe",
        "rope_interleave": True,
        "attention_bias": metadata.holds("attn_q.bias"),
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    }


def _write_gguf(config: ModelConfig) -> Fields:
    kinds = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]
    first = kinds.index(True) if True in kinds else len(kinds)
    after = kinds.index(True, first + 1) if True in kinds[first + 1 :] else first + 1
    return {
        "leading_dense_block_count": first,
        "interleave_moe_layer_step": after - first,
        "expert_shared_feed_forward_length": config.n_shared_experts
        * config.required("moe_intermediate_size"),
    }


ERNIE4_5_MOE = Family(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    _read,
    _write,
    Gguf("ernie4_5-moe", _read_gguf, _write_gguf),
    Tensors({"mlp.gate.e_score_correction_bias": BIAS}, leading=frozenset({BIAS})),
)
