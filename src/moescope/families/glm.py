"""GLM-4.5 and 4.6: DeepSeek-V3's mixture behind grouped-query attention."""

from moescope.config import ModelConfig
from moescope.families import deepseek
from moescope.families.dialect import halves
from moescope.families.family import Family, Fields, Gguf, Metadata


def _read(fields: Fields) -> Fields:
    read = deepseek.V3_DEFAULTS | {"routed_scaling_factor": 1.0, "first_k_dense_replace": 1}
    read |= {"partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "n_shared_experts": 1}
    read |= {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1} | halves(fields)
    if fields.get("num_mtp_layers") is not None:
        read["num_nextn_predict_layers"] = fields["num_mtp_layers"]
    norm = "head" if fields.get("use_qk_norm") else "none"
    return read | {"qk_norm": norm, "attention_out_bias": False}


def _write(config: ModelConfig) -> Fields:
    return deepseek.write(config) | {
        "head_dim": config.qk_head_dim,
        "partial_rotary_factor": config.partial_rotary_factor,
        "use_qk_norm": config.qk_norm == "head",
    }


def _read_gguf(metadata: Metadata) -> Fields:
    return {
        "model_type": "glm4_moe",
        "rope_interleave": False,
        "qk_norm": "head" if metadata.holds("attn_q_norm.weight") else "none",
        "attention_bias": metadata.holds("attn_q.bias"),
        "attention_out_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": metadata.get("expert_weights_norm", bool, True),
    }


GGUF = Gguf(
    "glm4moe",
    _read_gguf,
    lambda config: {"leading_dense_block_count": config.first_k_dense_replace},
    in_layer={"post_attention_layernorm": "post_attention_norm"},
)
GLM4_MOE = Family("glm4_moe", "Glm4MoeForCausalLM", _read, _write, GGUF)
