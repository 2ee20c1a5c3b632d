"""Granite's mixtures (IBM, 3.0): four multipliers, softmax over the chosen experts."""

from moescope.config import ModelConfig
from moescope.families.dialect import halves, renamed
from moescope.families.family import ExpertTensors, Family, Fields, Tensors

MULTIPLIERS = (
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
)


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


GRANITEMOE = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    _read,
    _write,
    Tensors(
        {"mlp.gate.weight": "block_sparse_moe.router.layer.weight"},
        ExpertTensors(
            gate_up="block_sparse_moe.input_linear.weight",
            down="block_sparse_moe.output_linear.weight",
        ),
    ),
)
