"""OLMoE (Muennighoff et al. 2024): 64 experts, none shared, weights not renormalised."""

from moescope.config import ModelConfig
from moescope.families.dialect import halves, renamed
from moescope.families.family import Family, Fields, Gguf, Metadata


def _read(fields: Fields) -> Fields:
    read = renamed(halves(fields), {"num_experts": "n_routed_experts"})
    read |= {"qk_norm": "full", "moe_intermediate_size": fields.get("intermediate_size")}
    return {"rms_norm_eps": 1e-5} | read


def _write(config: ModelConfig) -> Fields:
    return {
        "intermediate_size": config.moe_intermediate_size,
        "attention_bias": config.attention_bias,
        "clip_qkv": config.clip_qkv,
        "num_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob,
    }


def _read_gguf(metadata: Metadata) -> Fields:
    return {
        "model_type": "olmoe",
        "rope_interleave": False,
        "qk_norm": "full",
        "moe_intermediate_size": metadata.get("feed_forward_length", int),
        "clip_qkv": metadata.find("attention.clamp_kqv", float),
        "norm_topk_prob": metadata.get("expert_weights_norm", bool, False),
    }


def _write_gguf(config: ModelConfig) -> Fields:
    return {} if config.clip_qkv is None else {"attention.clamp_kqv": config.clip_qkv}


OLMOE = Family("olmoe", "OlmoeForCausalLM", _read, _write, Gguf("olmoe", _read_gguf, _write_gguf))
