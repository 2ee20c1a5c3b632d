"""V3's network with a lightning indexer: DeepSeek-V3.2 and GLM-5.

`config.json`: https://huggingface.co/deepseek-ai/DeepSeek-V3.2,
https://huggingface.co/zai-org/GLM-5.
"""

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.families import deepseek
from moescope.families.dialect import layer_types, plain
from moescope.families.family import Family, Fields, Gguf, Metadata

INDEXER: Fields = {"index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64}


def _read(fields: Fields) -> Fields:
    read = deepseek.V3_DEFAULTS | INDEXER | {"first_k_dense_replace": 3} | plain(fields)
    read = {"n_group": 1, "topk_group": 1} | read | {"layer_types": None}  # all are indexed
    types: list[str] | None = fields.get("mlp_layer_types")
    if types is None:
        return read
    return read | {"mlp_layer_types": None} | layer_types([kind == "dense" for kind in types])


def _read_glm(fields: Fields) -> Fields:
    given = {"index_n_heads": 32, "indexer_rope_interleave": True, "rms_norm_eps": 1e-5}
    return given | _read({"indexer_types": _indexer_types(fields), **fields})


def _indexer_types(fields: Fields) -> list[str]:
    """Which layers have an indexer of their own, told as a pattern or as a rhythm."""
    pattern = fields.get("index_topk_pattern")
    if isinstance(pattern, str):
        return [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    if pattern is not None:
        return list(pattern)
    rhythm = max(fields.get("index_topk_freq") or 1, 1)
    first = fields.get("index_skip_topk_offset", 2) - 1
    layers = range(fields.get("num_hidden_layers", 0))
    return ["shared" if max(layer - first, 0) % rhythm else "full" for layer in layers]


def _write(config: ModelConfig) -> Fields:
    indexer = config.model_dump(mode="json", include=set(INDEXER))
    kinds = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]
    mlp_layer_types = ["sparse" if kind else "dense" for kind in kinds]
    return deepseek.write(config) | indexer | {"mlp_layer_types": mlp_layer_types}


def _write_glm(config: ModelConfig) -> Fields:
    layers = range(config.num_hidden_layers)
    types = ["full" if config.has_indexer(layer) else "shared" for layer in layers]
    rotation = {"indexer_rope_interleave": config.indexer_rope_interleave}
    return _write(config) | rotation | {"indexer_types": types}


def _read_gguf(metadata: Metadata) -> Fields:
    layers = metadata.get("block_count", int) - (metadata.find("nextn_predict_layers", int) or 0)
    return deepseek.GGUF.read(metadata) | {
        "model_type": "glm_moe_dsa",
        "index_n_heads": metadata.get("attention.indexer.head_count", int),
        "index_head_dim": metadata.get("attention.indexer.key_length", int),
        "index_topk": metadata.get("attention.indexer.top_k", int),
        "indexer_types": ["full"] * layers,
        "indexer_rope_interleave": True,
    }


def _write_gguf(config: ModelConfig) -> Fields:
    if not all(config.has_indexer(layer) for layer in range(config.num_hidden_layers)):
        raise UserError(
            "GGUF has no place for layers that share an indexer's picks; save the model as a folder"
        )
    return deepseek.GGUF.write(config) | {
        "attention.indexer.head_count": config.required("index_n_heads"),
        "attention.indexer.key_length": config.required("index_head_dim"),
        "attention.indexer.top_k": config.required("index_topk"),
    }


GGUF = Gguf(
    "glm-dsa",
    _read_gguf,
    _write_gguf,
    in_layer={
        "self_attn.indexer.wq_b": "indexer.attn_q_b",
        "self_attn.indexer.wk": "indexer.attn_k",
        "self_attn.indexer.k_norm": "indexer.k_norm",
        "self_attn.indexer.weights_proj": "indexer.proj",
    },
)

DEEPSEEK_V32 = Family("deepseek_v32", "DeepseekV32ForCausalLM", _read, _write)
GLM_MOE_DSA = Family("glm_moe_dsa", "GlmMoeDsaForCausalLM", _read_glm, _write_glm, GGUF)
