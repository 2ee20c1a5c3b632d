"""What the page is told of a model's shape, from its config alone."""

from typing import Literal

from moescope.catalog import count_parameters
from moescope.config import ModelConfig
from moescope.engine import thinking
from moescope.lab.beside import ParameterCount
from moescope.server import schema
from moescope.server.companions import Companion
from moescope.text.tokenizer import Tokenizer


def layer_info(config: ModelConfig, layer_idx: int) -> schema.LayerInfo:
    """One layer."""
    kind: Literal["dense", "moe"] = "moe" if config.is_moe_layer(layer_idx) else "dense"
    return schema.LayerInfo(
        kind=kind,
        n_routed_experts=config.required("n_routed_experts") if kind == "moe" else 0,
        n_shared_experts=config.n_shared_experts if kind == "moe" else 0,
        by_table=kind == "moe" and layer_idx < config.num_hash_layers,
    )


def reference_info(config: ModelConfig) -> schema.ReferenceInfo:
    """A well-known mixture, to scale."""
    counted = count_parameters(config)
    return schema.ReferenceInfo(
        name="DeepSeek-R1",
        total=counted.total,
        active=counted.active,
        num_experts_per_tok=config.required("num_experts_per_tok"),
        n_routed_experts=config.required("n_routed_experts"),
        num_hidden_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        cache=cache_info(config),
    )


def companion_info(companion: Companion) -> schema.CompanionInfo:
    """A model that can be shown beside another."""
    return schema.CompanionInfo(name=companion.name, role=companion.role, problem=companion.problem)


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Parameters, and those at work on a token."""
    counted = count_parameters(config)
    return ParameterCount(total=counted.total, active=counted.active)


def cache_info(config: ModelConfig) -> schema.CacheInfo:
    """What a token leaves in the cache of a layer."""
    kind: Literal["latent", "grouped", "full", "compressed"]
    if config.uses_mla:
        kind = "latent"
        kept = config.required("kv_lora_rank") + config.required("qk_rope_head_dim")
        width = config.qk_head_dim + config.required("v_head_dim")
    else:
        kind = "grouped" if config.num_key_value_heads < config.num_attention_heads else "full"
        kept = 2 * config.num_key_value_heads * config.qk_head_dim
        width = 2 * config.qk_head_dim
    if config.compress_rates is not None:
        kind = "compressed"
    return schema.CacheInfo(kind=kind, kept=kept, full=config.num_attention_heads * width)


def thinks(tokenizer: Tokenizer) -> bool:
    """Whether a vocabulary has the marks around a chain of thought."""
    return tokenizer.token_id(thinking.BEGIN) in tokenizer.special_ids
