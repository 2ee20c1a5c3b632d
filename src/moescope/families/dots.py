"""dots.llm1 (rednote-hilab): DeepSeek-V3's mixture behind grouped-query attention with norms."""

from moescope.config import ModelConfig
from moescope.families import deepseek
from moescope.families.dialect import halves
from moescope.families.family import Family, Fields, Gguf, Metadata

SWITCHES: Fields = {
    "rope_interleave": False,
    "qk_norm": "head",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def _read(fields: Fields) -> Fields:
    window = fields.get("sliding_window", 4096)
    layers, first = fields.get("num_hidden_layers", 0), fields.get("max_window_layers", 62)
    slides = [window is not None and layer >= first for layer in range(layers)]
    told = ["sliding_attention" if slide else "full_attention" for slide in slides]
    read = {"n_group": 1, "topk_group": 1} | halves(fields) | SWITCHES
    types = fields.get("layer_types") or told
    if "sliding_attention" not in types:
        return read | {"sliding_window": None, "layer_types": None}
    return read | {"sliding_window": window, "layer_types": types}


def _write(config: ModelConfig) -> Fields:
    windows = [config.window_of(layer) for layer in range(config.num_hidden_layers)]
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return deepseek.write(config) | {
        "head_dim": config.qk_head_dim,
        "sliding_window": config.sliding_window,
        "layer_types": types,
    }


def _read_gguf(metadata: Metadata) -> Fields:
    return {"model_type": "dots1"} | SWITCHES


def _write_gguf(config: ModelConfig) -> Fields:
    return {"leading_dense_block_count": config.first_k_dense_replace}


DOTS1 = Family("dots1", "Dots1ForCausalLM", _read, _write, Gguf("dots1", _read_gguf, _write_gguf))
