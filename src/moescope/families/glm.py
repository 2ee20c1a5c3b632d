"""GLM-4.5 and 4.6: DeepSeek-V3's mixture behind grouped-query attention."""

from moescope.config import ModelConfig
from moescope.families import deepseek
from moescope.families.dialect import halves
from moescope.families.family import Family, Fields


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


GLM4_MOE = Family("glm4_moe", "Glm4MoeForCausalLM", _read, _write)
