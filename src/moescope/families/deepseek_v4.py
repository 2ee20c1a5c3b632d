"""DeepSeek-V4: compressed and sliding attention, tables of experts, streams of the residual.

`config.json`: https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash; `transformers` spells kinds of
layers by name where DeepSeek gives tokens an entry (`compress_ratios`). Multi-token prediction
(`mtp.`) is left out.
"""

from collections.abc import Mapping
from typing import Any

from moescope.config import ModelConfig
from moescope.families.dialect import plain
from moescope.families.family import ExpertTensors, Family, Fields, Tensors

SLIDING, SPARSE, HEAVY = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
RATES = {SPARSE: 4, HEAVY: 128}
DEFAULTS: Fields = {
    "head_dim": 512,
    "q_lora_rank": 1024,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "sliding_window": 128,
    "hc_mult": 4,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
}
SAME = (
    *DEFAULTS,
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "layer_types",
    "compress_rates",
    "compress_rope_theta",
    "hc_sinkhorn_iters",
    "hc_eps",
    "num_hash_layers",
)
"""What `config.json` and the network spell alike."""


def _read(fields: Fields) -> Fields:
    read = DEFAULTS | {"compress_rates": RATES} | plain(fields) | _rope(fields)
    layers = fields.get("num_hidden_layers", 0)
    rotated: int = fields.get("qk_rope_head_dim") or 64
    width: int = fields.get("head_dim") or 512
    return (
        {"partial_rotary_factor": rotated / width}
        | read
        | {
            "layer_types": _layer_types(fields, layers)[:layers],
            "num_hash_layers": _hash_layers(fields, layers),
            "mlp_layer_types": None,
            "qk_rope_head_dim": None,
            "num_key_value_heads": 1,
            "intermediate_size": fields.get("moe_intermediate_size"),
            "topk_method": "noaux_tc",
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
        }
    )


def _layer_types(fields: Fields, layers: int) -> list[str]:
    if fields.get("layer_types") is not None:
        return list(fields["layer_types"])
    if fields.get("compress_ratios") is not None:
        kinds = {0: SLIDING} | {rate: kind for kind, rate in RATES.items()}
        return [kinds.get(rate, f"a layer that joins {rate}") for rate in fields["compress_ratios"]]
    return [HEAVY if layer < 2 or layer % 2 == 0 else SPARSE for layer in range(layers)]


def _hash_layers(fields: Fields, layers: int) -> int:
    kinds: list[str] | None = fields.get("mlp_layer_types")
    if kinds is None:
        return min(fields.get("num_hash_layers", 3), layers)
    count = kinds.count("hash_moe")
    if "hash_moe" in kinds[count:]:
        raise ValueError("`mlp_layer_types` has a `hash_moe` layer behind a `moe` layer")
    return count


def _rope(fields: Fields) -> Fields:
    """Read the two bases, and how the second is stretched, in transformers' nested form."""
    parameters: dict[str, Any] = fields.get("rope_parameters") or {}
    main, entries = parameters.get("main"), parameters.get("compress")
    if not isinstance(main, Mapping) or not isinstance(entries, Mapping):
        return {}
    kind = entries.get("rope_type", "default")
    found = {
        "rope_theta": main.get("rope_theta"),
        "compress_rope_theta": entries.get("rope_theta"),
        "rope_scaling": None if kind == "default" else {**entries, "type": kind},
        "partial_rotary_factor": main.get("partial_rotary_factor"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _write(config: ModelConfig) -> Fields:
    fields = config.model_dump(mode="json", include=set(SAME))
    layers = range(config.num_hidden_layers)
    return fields | {
        "qk_rope_head_dim": config.rotary_dim,
        "partial_rotary_factor": config.partial_rotary_factor,
        "compress_ratios": [config.compress_rate_of(layer) or 0 for layer in layers],
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }


COMPRESSOR = {
    "position_bias": "ape",
    "kv_proj.weight": "wkv.weight",
    "gate_proj.weight": "wgate.weight",
    "kv_norm.weight": "norm.weight",
}
INDEXER = {
    "q_b_proj.weight": "wq_b.weight",
    "weights_proj.weight": "weights_proj.weight",
} | {f"compressor.{ours}": f"compressor.{theirs}" for ours, theirs in COMPRESSOR.items()}
ATTENTION = (
    {
        "q_a_proj.weight": "wq_a.weight",
        "q_a_norm.weight": "q_norm.weight",
        "q_b_proj.weight": "wq_b.weight",
        "kv_proj.weight": "wkv.weight",
        "kv_norm.weight": "norm.weight",
        "o_a_proj.weight": "wo_a.weight",
        "o_b_proj.weight": "wo_b.weight",
        "sinks": "attn_sink",
    }
    | {f"compressor.{ours}": f"compressor.{theirs}" for ours, theirs in COMPRESSOR.items()}
    | {f"indexer.{ours}": f"indexer.{theirs}" for ours, theirs in INDEXER.items()}
)
STREAMS = ("fn", "base", "scale")
IN_LAYER = (
    {
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
        "mlp.gate.weight": "ffn.gate.weight",
        "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
        "mlp.gate.tid2eid": "ffn.gate.tid2eid",
        "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
        "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
        "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    }
    | {f"self_attn.{ours}": f"attn.{theirs}" for ours, theirs in ATTENTION.items()}
    | {f"{half}_hc.{part}": f"hc_{half}_{part}" for half in ("attn", "ffn") for part in STREAMS}
)
BEGINNINGS = {
    "layers.": "model.layers.",
    "embed.": "model.embed_tokens.",
    "norm.": "model.norm.",
    "hc_head_": "model.hc_head.hc_",
    "head.": "lm_head.",
}

DEEPSEEK_V4 = Family(
    "deepseek_v4",
    "DeepseekV4ForCausalLM",
    _read,
    _write,
    tensors=Tensors(
        IN_LAYER,
        ExpertTensors(
            gate="ffn.experts.{expert}.w1.weight",
            up="ffn.experts.{expert}.w3.weight",
            down="ffn.experts.{expert}.w2.weight",
        ),
        beginnings=BEGINNINGS,
        unused=("mtp.",),
    ),
)
