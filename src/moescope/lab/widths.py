"""How many numbers attention keeps and multiplies, by kind."""

from moescope.config import ModelConfig
from moescope.model.compressed_attention import SPARSE


def cached_numbers(config: ModelConfig) -> int:
    """Numbers that all layers must keep of each token of a long text.

    Latent attention keeps `kv_lora_rank + qk_rope_head_dim` (DeepSeek-V2, section 2.1), grouped-
    query attention a key and a value for each key-value head, a lightning indexer a key of its own
    (DeepSeek-V3.2, section 2.1). Layers with a window let go of what is behind it, DeepSeek-V4's
    keep an entry for every so many tokens, with an indexer's where it picks (section 2.3).
    """
    numbers = 0.0
    for layer in range(config.num_hidden_layers):
        rate = config.compress_rate_of(layer)
        if rate is not None:
            numbers += (config.qk_head_dim + _indexed(config, layer)) / rate
        elif config.window_of(layer) is None:
            numbers += _kept(config) + _indexed(config, layer)
    return round(numbers)


def held_numbers(config: ModelConfig) -> int:
    """Numbers that moescope keeps of each token in all layers.

    It lets go of nothing behind a window, and keeps beside DeepSeek-V4's entries what they are made
    of (`model/compressed_attention.py`).
    """
    numbers = 0.0
    for layer in range(config.num_hidden_layers):
        rate, indexed = config.compress_rate_of(layer), _indexed(config, layer)
        if config.compress_rates is None:
            numbers += _kept(config) + indexed
            continue
        numbers += config.qk_head_dim  # key and value at once
        if rate is not None:
            width = config.qk_head_dim + indexed
            made_of = (2 if indexed else 1) * 2 * width  # overlapping halves, states and gates
            numbers += made_of + width / rate
    return round(numbers)


def plain_numbers(config: ModelConfig) -> int:
    """What plain attention would keep in a layer: a key and a value for each head.

    Source: DeepSeek-V2, table 1.
    """
    if config.uses_mla:
        head = config.required("qk_nope_head_dim") + config.required("v_head_dim")
        return config.num_attention_heads * head
    return config.num_attention_heads * 2 * config.qk_head_dim


def attention_flops(config: ModelConfig, context: int, *, reading: bool) -> int:
    """Operations of all layers' attention on a token.

    Args:
        config: of the network.
        context: tokens before it; of a prompt that is read, the mean over so many tokens is told.
        reading: whether it is one of a prompt, whose keys and values are expanded.
    """
    head = _expanded_width(config) if reading else _cached_width(config)
    products = 0.0
    for layer in range(config.num_hidden_layers):
        attended, scanned = _looked_at(config, layer, context, reading)
        products += config.num_attention_heads * attended * head
        if scanned:
            products += config.required("index_n_heads") * scanned * _indexed(config, layer)
    return round(2 * products)


def _looked_at(config: ModelConfig, layer: int, context: int, reading: bool) -> tuple[float, float]:
    """Tokens and entries that attention takes in, and those that an indexer scores for it."""
    count = _mean_of_growing if reading else min
    window, rate = config.window_of(layer), config.compress_rate_of(layer)
    near = 0.0 if window is None else count(context, window)
    if rate is None and window is not None:
        return near, 0
    far = context / (rate or 1)
    if not _indexed(config, layer):
        picks = config.index_topk if config.uses_mla else None  # those of a layer before
        return near + count(far, far if picks is None else picks), 0
    return near + count(far, config.required("index_topk")), count(far, far)


def _mean_of_growing(length: float, most: float) -> float:
    """The mean of what grows from 0 to `length`, but not above `most`."""
    return length / 2 if length <= most else most - most * most / (2 * length)


def _indexed(config: ModelConfig, layer: int) -> int:
    """Numbers of an indexer's key; 0 for layers that have none."""
    picks = (
        config.has_indexer(layer)
        if config.compress_rates is None
        else config.layer_type_of(layer) == SPARSE
    )
    return config.required("index_head_dim") if picks else 0


def _kept(config: ModelConfig) -> int:
    if config.uses_mla:
        return config.required("kv_lora_rank") + config.required("qk_rope_head_dim")
    return 2 * config.num_key_value_heads * config.qk_head_dim


def _cached_width(config: ModelConfig) -> int:
    """Products that a head takes with each earlier token in the cache, latents as they are."""
    if config.uses_mla:
        return 2 * config.required("kv_lora_rank") + config.required("qk_rope_head_dim")
    return 2 * config.qk_head_dim


def _expanded_width(config: ModelConfig) -> int:
    """Products that a head takes with each earlier token of a prompt, keys and values expanded."""
    if config.uses_mla:
        return config.qk_head_dim + config.required("v_head_dim")
    return 2 * config.qk_head_dim
