"""What the dialects of several families have in common."""

from collections.abc import Mapping
from typing import Any

from moescope.config import ModelConfig
from moescope.families.family import Fields


def renamed(fields: Fields, names: Mapping[str, str]) -> Fields:
    """Return `fields` with those called as a key of `names` under the name that it gives."""
    found = {ours: fields[theirs] for theirs, ours in names.items() if theirs in fields}
    return {name: value for name, value in fields.items() if name not in names} | found


def rope(fields: Fields, theta: float | None = None) -> Fields:
    """Return how positions are rotated, from `rope_parameters` or `rope_scaling`.

    Args:
        fields: of a `config.json` as transformers 4 or 5 writes it.
        theta: where none is given.

    Raises:
        ValueError: one of the two is no object.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(fields.get(name) or {}, dict):
            raise ValueError(f"`{name}` is {fields[name]!r}: input should be an object")
    parameters: dict[str, Any] = fields.get("rope_parameters") or {}
    scaling: dict[str, Any] = {**(fields.get("rope_scaling") or parameters)}
    kind = scaling.get("type") or scaling.get("rope_type")
    found = {
        "rope_theta": fields.get("rope_theta", parameters.get("rope_theta", theta)),
        "rope_scaling": None if kind in (None, "default") else {**scaling, "type": kind},
        "partial_rotary_factor": fields.get(
            "partial_rotary_factor", parameters.get("partial_rotary_factor")
        ),
    }
    return {name: value for name, value in found.items() if value is not None}


def plain(fields: Fields, theta: float | None = None) -> Fields:
    """Return `fields` with rotary positions and key-value heads as `ModelConfig` spells them."""
    read = {name: value for name, value in fields.items() if value is not None}
    read.pop("rope_scaling", None)
    read.setdefault("num_key_value_heads", read.get("num_attention_heads"))
    return read | rope(fields, theta)


def halves(fields: Fields, theta: float | None = None) -> Fields:
    """As `plain`, with rotated pairs that are halves of a head (Llama's way), not neighbours."""
    return plain(fields, theta) | {"rope_interleave": False}


NOT_DENSE = (
    *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("moe_layer_freq", "first_k_dense_replace", "scoring_func", "topk_method", "n_group"),
    *("topk_group", "norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers"),
)
"""Fields of mixtures and latent attention, which mean nothing in a dense family's config."""


def dense(fields: Fields) -> Fields:
    """As `halves`, for families without experts and latents."""
    return {name: value for name, value in halves(fields).items() if name not in NOT_DENSE}


def windows(fields: Fields) -> Fields:
    """Return the sliding window of Qwen's dialect, which `use_sliding_window` switches on."""
    if not fields.get("use_sliding_window") or fields.get("sliding_window") is None:
        return {"sliding_window": None, "layer_types": None}
    layers, first = fields.get("num_hidden_layers", 0), fields.get("max_window_layers", 28)
    told = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    return {"layer_types": fields.get("layer_types") or told}


COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "hidden_act",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Fields that every family spells alike. A null is written: `transformers` has other defaults."""


def common(config: ModelConfig) -> Fields:
    """Return the fields that every family spells alike, and two where they are known."""
    fields = config.model_dump(mode="json", include=set(COMMON))
    for name in ("head_dim", "trained_length"):
        if getattr(config, name) is not None:
            fields[name] = getattr(config, name)
    if config.rope_scaling is not None:
        fields["rope_scaling"] = config.rope_scaling.model_dump(
            exclude_none=True, exclude_defaults=True
        ) | {"rope_type": config.rope_scaling.type}
    return fields


def layer_types(dense: list[bool]) -> Fields:
    """Return which layers have no experts, as `first_k_dense_replace` where that can say it."""
    first = dense.index(False) if False in dense else len(dense)
    if not any(dense[first:]):
        return {"first_k_dense_replace": first}
    return {"mlp_layer_types": ["dense" if is_dense else "sparse" for is_dense in dense]}
