"""Granite's mixtures (IBM, 3.0): four multipliers, softmax over the chosen experts."""

from moescope.config import ModelConfig
from moescope.families.dialect import halves, renamed
from moescope.families.family import ExpertTensors, Family, Fields, Gguf, Metadata, Tensors

MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
"""With their keys in GGUF."""


def _read(fields: Fields) -> Fields:
    read = renamed(halves(fields), {"num_local_experts": "n_routed_experts"})
    read |= {"moe_intermediate_size": fields.get("intermediate_size")}
    read = {"attention_multiplier": 1.0} | read  # not the square root, where none is given
    return read | {"softmax_after_topk": True, "norm_topk_prob": True}


def _write(config: ModelConfig) -> Fields:
    return config.model_dump(include=set(MULTIPLIERS), exclude_none=True) | {
        "intermediate_size": config.moe_intermediate_size,
        "attention_bias": config.attention_bias,
        "num_local_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
    }


def _read_gguf(metadata: Metadata) -> Fields:
    found = {ours: metadata.find(theirs, float) for ours, theirs in MULTIPLIERS.items()}
    return found | {
        "model_type": "granitemoe",
        "rope_interleave": False,
        "moe_intermediate_size": metadata.get("feed_forward_length", int),
        "softmax_after_topk": True,
        "norm_topk_prob": True,
    }


def _write_gguf(config: ModelConfig) -> Fields:
    found = {theirs: getattr(config, ours) for ours, theirs in MULTIPLIERS.items()}
    return {key: float(value) for key, value in found.items() if value is not None}


GRANITEMOE = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    _read,
    _write,
    Gguf("granitemoe", _read_gguf, _write_gguf, permuted=True),
    Tensors(
        {"mlp.gate.weight": "block_sparse_moe.router.layer.weight"},
        ExpertTensors(
            gate_up="block_sparse_moe.input_linear.weight",
            down="block_sparse_moe.output_linear.weight",
        ),
    ),
)
