"""Mixtral (Jiang et al. 2024): few large experts, softmax over the two chosen."""

from moescope.config import ModelConfig
from moescope.families import llama
from moescope.families.dialect import halves, renamed
from moescope.families.family import ExpertTensors, Family, Fields, Tensors

EXPERTS = ExpertTensors(
    gate="block_sparse_moe.experts.{expert}.w1.weight",
    up="block_sparse_moe.experts.{expert}.w3.weight",
    down="block_sparse_moe.experts.{expert}.w2.weight",
)


def _read(fields: Fields) -> Fields:
    read = renamed(halves(fields, theta=1e6), {"num_local_experts": "n_routed_experts"})
    read |= {"moe_intermediate_size": fields.get("intermediate_size"), "layer_types": None}
    return {"rms_norm_eps": 1e-5} | read | {"softmax_after_topk": True, "norm_topk_prob": True}


def _write(config: ModelConfig) -> Fields:
    return {
        "intermediate_size": config.moe_intermediate_size,
        "num_local_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "sliding_window": config.sliding_window,
    }


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _read,
    _write,
    llama.GGUF,
    Tensors({"mlp.gate.weight": "block_sparse_moe.gate.weight"}, EXPERTS),
)
