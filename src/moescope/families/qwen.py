"""Qwen 2 and 3, dense and as mixtures, and R1's distillations of them."""

from moescope.config import ModelConfig
from moescope.families.dialect import dense, halves, layer_types, renamed, windows
from moescope.families.family import Family, Fields, Gguf, Metadata


def _read_qwen2(fields: Fields) -> Fields:
    biases = {"attention_bias": True, "attention_out_bias": False}
    return dense(fields) | windows(fields) | biases


def _read_qwen3(fields: Fields) -> Fields:
    return {"head_dim": 128} | dense(fields) | windows(fields) | {"qk_norm": "head"}


def _read_qwen3_moe(fields: Fields) -> Fields:
    read = renamed(halves(fields), {"num_experts": "n_routed_experts"})
    read = renamed(read, {"num_local_experts": "n_routed_experts"})
    dense_only, step = fields.get("mlp_only_layers") or [], fields.get("decoder_sparse_step") or 1
    layers = range(fields.get("num_hidden_layers", 0))
    is_dense = [layer in dense_only or (layer + 1) % step != 0 for layer in layers]
    every = {"layer_types": None} if fields.get("use_sliding_window") else windows(fields)
    return read | {"qk_norm": "head"} | layer_types(is_dense) | every


def _write_window(config: ModelConfig) -> Fields:
    if config.sliding_window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    layers = [config.window_of(layer) for layer in range(config.num_hidden_layers)]
    types = ["full_attention" if window is None else "sliding_attention" for window in layers]
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "layer_types": types,
    }


def _write_qwen3(config: ModelConfig) -> Fields:
    return _write_window(config) | {
        "head_dim": config.qk_head_dim,
        "attention_bias": config.attention_bias,
    }


def _write_qwen3_moe(config: ModelConfig) -> Fields:
    layers = range(config.num_hidden_layers)
    return _write_qwen3(config) | {
        "num_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in layers if not config.is_moe_layer(layer)],
    }


# --- GGUF ----------------------------------------------------------------------------------------


def _read_gguf_qwen2(metadata: Metadata) -> Fields:
    biases = {"attention_bias": True, "attention_out_bias": False}
    return {"model_type": "qwen2", "rope_interleave": False} | biases


def _read_gguf_qwen3(metadata: Metadata) -> Fields:
    return {"model_type": "qwen3", "rope_interleave": False, "qk_norm": "head"}


def _read_gguf_qwen3_moe(metadata: Metadata) -> Fields:
    weights = {"norm_topk_prob": metadata.get("expert_weights_norm", bool, True)}
    return _read_gguf_qwen3(metadata) | weights | {"model_type": "qwen3_moe"}


QWEN2 = Family(
    "qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_window, Gguf("qwen2", _read_gguf_qwen2)
)
QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, Gguf("qwen3", _read_gguf_qwen3)
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _read_qwen3_moe,
    _write_qwen3_moe,
    Gguf("qwen3moe", _read_gguf_qwen3_moe),
)
