"""gpt-oss (OpenAI): attention sinks, windows in every other layer, biases in the experts."""

from typing import Any

from moescope.config import ModelConfig
from moescope.families.dialect import halves, renamed
from moescope.families.family import ExpertTensors, Family, Fields, Gguf, Metadata, Tensors

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def _read(fields: Fields) -> Fields:
    if not fields.get("rope_parameters") and not fields.get("rope_scaling"):
        fields = fields | {"rope_scaling": YARN}
    read = renamed(halves(fields, theta=150000.0), {"num_local_experts": "n_routed_experts"})
    read = {"head_dim": 64, "sliding_window": 128, "swiglu_limit": 7.0} | read
    layers = range(fields.get("num_hidden_layers", 0))
    types = ["full_attention" if layer % 2 else "sliding_attention" for layer in layers]
    return (
        {"rms_norm_eps": 1e-5, "attention_bias": True, "layer_types": types}
        | read
        | {
            "moe_intermediate_size": fields.get("intermediate_size"),
            "attention_sinks": True,
            "expert_act": "swigluoai",
            "expert_bias": True,
            "router_bias": True,
            "softmax_after_topk": True,
            "norm_topk_prob": True,
        }
    )


def _write(config: ModelConfig) -> Fields:
    return {
        "intermediate_size": config.moe_intermediate_size,
        "head_dim": config.qk_head_dim,
        "attention_bias": config.attention_bias,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types or ()),
        "num_local_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "swiglu_limit": config.swiglu_limit,
    }


def _read_gguf(metadata: Metadata) -> Fields:
    layers = range(metadata.get("block_count", int))
    return {
        "model_type": "gpt_oss",
        "rope_interleave": False,
        "attention_bias": True,
        "attention_sinks": True,
        "sliding_window": metadata.get("attention.sliding_window", int),
        "layer_types": ["full_attention" if n % 2 else "sliding_attention" for n in layers],
        "expert_act": "swigluoai",
        "expert_bias": True,
        "swiglu_limit": 7.0,
        "router_bias": True,
        "softmax_after_topk": True,
        "norm_topk_prob": True,
    }


def _write_gguf(config: ModelConfig) -> Fields:
    return {"attention.sliding_window": config.required("sliding_window")}


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    _read,
    _write,
    Gguf(
        "gpt-oss",
        _read_gguf,
        _write_gguf,
        in_layer={"post_attention_layernorm": "post_attention_norm"},
        rope_scaling={"truncate": False},
    ),
    Tensors(
        {
            "mlp.gate.weight": "mlp.router.weight",
            "mlp.gate.bias": "mlp.router.bias",
            "mlp.experts.gate_up_proj_bias": "mlp.experts.gate_up_proj_bias",
            "mlp.experts.down_proj_bias": "mlp.experts.down_proj_bias",
        },
        ExpertTensors(
            gate_up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj", transposed=True
        ),
    ),
)
