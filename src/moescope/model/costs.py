"""What a network costs, counted from its config alone: parameters, cache and operations."""

from collections import Counter
from dataclasses import dataclass

from moescope.config import ModelConfig
from moescope.model.compressed_attention import SPARSE
from moescope.model.decoder import without_numbers

# --- parameters -----------------------------------------------------------------------------------


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
        norm: all norms, and what mixes several residual streams (DeepSeek-V4).
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
    "_hc.": "norm",
    "hc_head.": "norm",
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


def weight_flops(parameters: Parameters) -> int:
    """Operations of all weights on a token: two for each that multiplies it."""
    return 2 * (parameters.active_without_embedding - parameters.norm)


# --- the cache ------------------------------------------------------------------------------------


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
            numbers += kept_numbers(config) + _indexed(config, layer)
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
            numbers += kept_numbers(config) + indexed
            continue
        numbers += config.qk_head_dim  # key and value at once
        if rate is not None:
            width = config.qk_head_dim + indexed
            made_of = (2 if indexed else 1) * 2 * width  # overlapping halves, states and gates
            numbers += made_of + width / rate
    return round(numbers)


def kept_numbers(config: ModelConfig) -> int:
    """Numbers that a layer without an indexer or windows keeps of each token."""
    if config.uses_mla:
        return config.required("kv_lora_rank") + config.required("qk_rope_head_dim")
    return 2 * config.num_key_value_heads * config.qk_head_dim


def plain_numbers(config: ModelConfig) -> int:
    """What plain attention would keep in a layer: a key and a value for each head.

    Source: DeepSeek-V2, table 1.
    """
    if config.uses_mla:
        head = config.required("qk_nope_head_dim") + config.required("v_head_dim")
        return config.num_attention_heads * head
    return config.num_attention_heads * 2 * config.qk_head_dim


# --- attention's operations -----------------------------------------------------------------------


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
