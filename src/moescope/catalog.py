"""The published shapes, by name, and how many parameters a shape has."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescope.config import ModelConfig
from moescope.families import open_config, read_config
from moescope.model.decoder import without_numbers

BOX = Path(__file__).parent / "box"
"""Folder of the models that come with the package."""

_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
_MOE_16B = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}
_V3: dict[str, Any] = _MLA | {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "max_position_embeddings": 163840,
    "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
_QWEN2 = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 131072}
_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

_PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek-ai/deepseek-moe-16b-base": _MOE_16B
    | {"model_type": "deepseek", "num_hidden_layers": 28, "max_position_embeddings": 4096},
    "deepseek-ai/DeepSeek-V2": _MLA
    | {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "first_k_dense_replace": 1,
        "q_lora_rank": 1536,
        "max_position_embeddings": 163840,
        "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek-ai/DeepSeek-V2-Lite": _MLA
    | _MOE_16B
    | {
        "model_type": "deepseek_v2",
        "num_hidden_layers": 27,
        "max_position_embeddings": 163840,
        "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek-ai/DeepSeek-V3": _V3,
    "deepseek-ai/DeepSeek-R1": _V3,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2
    | {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN2
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _QWEN2
    | {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": _QWEN2
    | {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": _LLAMA3
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""By Hub name, what matters to the network in the `config.json` found there."""


@dataclass(frozen=True)
class Entry:
    """A published shape.

    Attributes:
        source: the Hub name whose `config.json` it is.
        config: the shape.
    """

    source: str
    config: ModelConfig


def catalog() -> dict[str, Entry]:
    """Return every shape by its short name, the model in the box first."""
    entries = {
        path.parent.name: Entry("in the box", open_config(path))
        for path in sorted(BOX.glob("*/config.json"))
    }
    for source, fields in _PUBLISHED.items():
        name = source.split("/")[1].lower().removesuffix("-base")
        entries[name] = Entry(source, read_config(fields, source))
    return entries


@dataclass(frozen=True)
class Parameters:
    """How many weights a model has, and where they stand.

    Attributes:
        total: all but `mtp`, which DeepSeek counts apart; a tied matrix once.
        active: of them, what works on one token: all but the routed experts that it does not
            visit. Routers without a fixed number of experts count with their mean.
        active_without_embedding: the same without the input embedding, of which a token takes
            one row and multiplies by none.
        embedding: the input embedding; none if it is tied, as then it is `lm_head`.
        attention: projections and their biases.
        dense_mlp: feed-forward parts of layers without experts.
        routed_experts: all of them.
        shared_experts: those that see every token.
        router: the maps that score experts.
        norm: all norms.
        lm_head: the map to logits.
        mtp: multi-token prediction, embedding and head not included.
    """

    total: int
    active: int
    active_without_embedding: int
    embedding: int
    attention: int
    dense_mlp: int
    routed_experts: int
    shared_experts: int
    router: int
    norm: int
    lm_head: int
    mtp: int


_PARTS = {
    "mtp.": "mtp",
    "embed_tokens.": "embedding",
    "lm_head.": "lm_head",
    "norm.": "norm",
    ".shared_experts.": "shared_experts",
    ".experts.": "routed_experts",
    ".mlp.gate.": "router",
    ".self_attn.": "attention",
    ".mlp.": "dense_mlp",
}
"""What a parameter belongs to, by a piece of its name; the first that fits decides."""


def count_parameters(config: ModelConfig) -> Parameters:
    """Count the weights of the network that `config` describes, without making them."""
    model = without_numbers(config)
    counted: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counted[next(part for piece, part in _PARTS.items() if piece in name)] += parameter.numel()
    if config.tie_word_embeddings:
        counted["lm_head"] = counted.pop("embedding")
    split = {part: counted[part] for part in _PARTS.values()}
    total = sum(split.values()) - split["mtp"]
    active = total - split["routed_experts"]
    if config.n_routed_experts is not None:
        visited = config.required("num_experts_per_tok")
        active += split["routed_experts"] * visited // config.n_routed_experts
    return Parameters(
        total=total, active=active, active_without_embedding=active - split["embedding"], **split
    )
