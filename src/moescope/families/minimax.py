"""MiniMax-M2: sigmoid scores with a bias, none shared, norms over all heads at once."""

from moescope.config import ModelConfig
from moescope.families.dialect import halves, renamed
from moescope.families.family import Family, Fields, Gguf, Metadata, Tensors
from moescope.families.mixtral import EXPERTS


def _read(fields: Fields) -> Fields:
    read = renamed(halves(fields, theta=5e6), {"num_local_experts": "n_routed_experts"})
    read = {"head_dim": 128} | read
    if fields.get("rotary_dim") is not None:
        share = fields["rotary_dim"] / read["head_dim"]
        read = {"partial_rotary_factor": share} | read
    return read | {
        "moe_intermediate_size": fields.get("intermediate_size"),
        "qk_norm": "full",
        "layer_types": None,
        "sliding_window": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    }


def _write(config: ModelConfig) -> Fields:
    return {
        "intermediate_size": config.moe_intermediate_size,
        "head_dim": config.qk_head_dim,
        "rotary_dim": config.rotary_dim,
        "num_local_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    }


def _read_gguf(metadata: Metadata) -> Fields:
    return {
        "model_type": "minimax_m2",
        "rope_interleave": False,
        "qk_norm": "full",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    }


MINIMAX_M2 = Family(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    _read,
    _write,
    Gguf("minimax-m2", _read_gguf),
    Tensors(
        {
            "mlp.gate.weight": "block_sparse_moe.gate.weight",
            "mlp.gate.e_score_correction_bias": "block_sparse_moe.e_score_correction_bias",
        },
        EXPERTS,
    ),
)
