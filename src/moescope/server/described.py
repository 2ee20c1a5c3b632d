"""What the page is told of a model's shape, from its config alone."""

from typing import Literal

from moescope.config import ModelConfig
from moescope.engine import thinking
from moescope.lab.beside import ParameterCount
from moescope.model.costs import count_parameters, kept_numbers, plain_numbers
from moescope.server import schema
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


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Parameters, and those at work on a token."""
    counted = count_parameters(config)
    return ParameterCount(total=counted.total, active=counted.active)


def cache_info(config: ModelConfig) -> schema.CacheInfo:
    """What a token leaves in the cache of a layer."""
    kind: Literal["latent", "grouped", "full", "compressed"]
    if config.compress_rates is not None:
        kind = "compressed"
    elif config.uses_mla:
        kind = "latent"
    else:
        kind = "grouped" if config.num_key_value_heads < config.num_attention_heads else "full"
    return schema.CacheInfo(kind=kind, kept=kept_numbers(config), full=plain_numbers(config))


def thinks(tokenizer: Tokenizer) -> bool:
    """Whether a vocabulary has the marks around a chain of thought."""
    return tokenizer.token_id(thinking.BEGIN) in tokenizer.special_ids
