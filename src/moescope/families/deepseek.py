"""DeepSeek's line, V1 to V3 and R1, and V3's network under other names.

`config.json`: https://huggingface.co/deepseek-ai/DeepSeek-V3, `configuration_deepseek.py`.
"""

from moescope.config import ModelConfig
from moescope.families.dialect import halves, layer_types, plain
from moescope.families.family import Family, Fields, Gguf, Metadata, Tensors

FIELDS = (
    "rope_interleave",
    "attention_bias",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_layer_freq",
    "first_k_dense_replace",
    "scoring_func",
    "topk_method",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "num_nextn_predict_layers",
)
"""What DeepSeek's dialect and the network spell alike."""

V3_DEFAULTS: Fields = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


def _groups(fields: Fields) -> Fields:
    if fields.get("topk_method") == "noaux_tc" and fields.get("n_group") is None:
        return fields | {"n_group": 1, "topk_group": 1}
    return fields


def _read_v1(fields: Fields) -> Fields:
    return _groups(halves(fields))


def _read_v2(fields: Fields) -> Fields:
    return _groups(plain(fields))


def _read_v3(fields: Fields) -> Fields:
    return _groups(V3_DEFAULTS | plain(fields))


def _read_glm(fields: Fields) -> Fields:
    """GLM-4.7-Flash lists its layers, and has another scale."""
    read = _read_v3({"routed_scaling_factor": 1.8, **fields})
    types = read.pop("mlp_layer_types", None)
    dense = [True] + [False] * (read.get("num_hidden_layers", 1) - 1)
    told = dense if types is None else [kind == "dense" for kind in types]
    return read if "first_k_dense_replace" in read and types is None else read | layer_types(told)


def write(config: ModelConfig) -> Fields:
    """Return the fields by DeepSeek's names."""
    fields = config.model_dump(mode="json", include=set(FIELDS), exclude_none=True)
    if config.uses_mla:  # a null that `transformers` must be told
        fields["q_lora_rank"] = config.q_lora_rank
    return fields


def _write_glm(config: ModelConfig) -> Fields:
    kinds = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]
    return write(config) | {"mlp_layer_types": ["sparse" if kind else "dense" for kind in kinds]}


# --- GGUF ----------------------------------------------------------------------------------------


def _read_gguf_v1(metadata: Metadata) -> Fields:
    return {"model_type": "deepseek", "rope_interleave": False}


def _read_gguf(metadata: Metadata) -> Fields:
    """V2, or V3 and all that share its network: a bias in the choice sets V3 apart.

    Files before April 2025 give the widths of a head where newer ones give those of a latent.
    Groups of experts are ranked as DeepSeek's code ranks them: without a bias (V2) by their best
    score, where llama.cpp takes the sum of the two best.
    """
    rope = metadata.get("rope.dimension_count", int)
    key = metadata.find("attention.key_length_mla", int)
    value = metadata.find("attention.value_length_mla", int)
    has_bias = metadata.holds("exp_probs_b.bias")
    limited = (metadata.find("expert_group_count", int) or 1) > 1
    return {
        "model_type": "deepseek_v3" if has_bias else "deepseek_v2",
        "num_key_value_heads": metadata.get("attention.head_count", int),
        "head_dim": None,
        "q_lora_rank": metadata.get("attention.q_lora_rank", int, 0) or None,
        "kv_lora_rank": metadata.get("attention.kv_lora_rank", int),
        "qk_nope_head_dim": (key or metadata.get("attention.key_length", int)) - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value or metadata.get("attention.value_length", int),
        "scoring_func": "sigmoid" if has_bias else "softmax",
        "topk_method": "noaux_tc"
        if has_bias
        else ("group_limited_greedy" if limited else "greedy"),
    }


def _write_gguf(config: ModelConfig) -> Fields:
    rank, rope = config.required("kv_lora_rank"), config.required("qk_rope_head_dim")
    return {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config.q_lora_rank or 0,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.required("v_head_dim"),
        "leading_dense_block_count": config.first_k_dense_replace,
    }


GGUF_V1 = Gguf(
    "deepseek",
    _read_gguf_v1,
    lambda config: {"leading_dense_block_count": config.first_k_dense_replace},
    permuted=True,
)
GGUF = Gguf("deepseek2", _read_gguf, _write_gguf)


def _routes_v1(config: ModelConfig) -> bool:
    """V1's published code knows one router."""
    return (config.topk_method, config.scoring_func) == ("greedy", "softmax")


def _routes_v2(config: ModelConfig) -> bool:
    """`transformers` reads V2's `topk_method`, but takes softmax scores as they are."""
    known = config.topk_method in ("greedy", "group_limited_greedy")
    return known and config.scoring_func == "softmax" and not config.norm_topk_prob


def _routes_v3(config: ModelConfig) -> bool:
    """`transformers` reads neither `topk_method` nor `scoring_func` of V3: both are fixed."""
    return (config.topk_method, config.scoring_func) == ("noaux_tc", "sigmoid")


DEEPSEEK = Family("deepseek", "DeepseekForCausalLM", _read_v1, write, GGUF_V1, routes=_routes_v1)
DEEPSEEK_V2 = Family(
    "deepseek_v2", "DeepseekV2ForCausalLM", _read_v2, write, GGUF, routes=_routes_v2
)
DEEPSEEK_V3 = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", _read_v3, write, GGUF, routes=_routes_v3
)
KIMI_K2 = Family(
    "kimi_k2",
    "DeepseekV3ForCausalLM",
    _read_v3,
    write,
    GGUF,
    Tensors(prefix="language_model."),
    routes=_routes_v3,
)
JOYAI_LLM_FLASH = Family(
    "joyai_llm_flash", "DeepseekV3ForCausalLM", _read_v3, write, GGUF, routes=_routes_v3
)
GLM4_MOE_LITE = Family(
    "glm4_moe_lite", "Glm4MoeLiteForCausalLM", _read_glm, _write_glm, GGUF, routes=_routes_v3
)
