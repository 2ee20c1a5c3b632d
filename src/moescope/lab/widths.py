"""How many numbers attention keeps and multiplies, by kind."""

from moescope.config import ModelConfig


def cached_numbers(config: ModelConfig) -> int:
    """Numbers that a layer keeps of a token.

    Latent attention keeps `kv_lora_rank + qk_rope_head_dim` (DeepSeek-V2, section 2.1), grouped-
    query attention a key and a value for each key-value head.
    """
    if config.uses_mla:
        return config.required("kv_lora_rank") + config.required("qk_rope_head_dim")
    return 2 * config.num_key_value_heads * config.qk_head_dim


def plain_numbers(config: ModelConfig) -> int:
    """What plain attention would keep: a key and a value for each head (DeepSeek-V2, table 1)."""
    if config.uses_mla:
        head = config.required("qk_nope_head_dim") + config.required("v_head_dim")
        return config.num_attention_heads * head
    return config.num_attention_heads * 2 * config.qk_head_dim


def cached_width(config: ModelConfig) -> int:
    """Products that a head takes with each earlier token in the cache, latents as they are."""
    if config.uses_mla:
        return 2 * config.required("kv_lora_rank") + config.required("qk_rope_head_dim")
    return 2 * config.qk_head_dim


def expanded_width(config: ModelConfig) -> int:
    """Products that a head takes with each earlier token of a prompt, keys and values expanded."""
    if config.uses_mla:
        return config.qk_head_dim + config.required("v_head_dim")
    return 2 * config.qk_head_dim
