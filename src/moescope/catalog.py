"""The published shapes, by name, and how many parameters a shape has."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from moescope.config import ModelConfig
from moescope.families import open_config, read_config
from moescope.model.decoder import without_numbers
from moescope.published import PUBLISHED

BOX = Path(__file__).parent / "box"
"""Folder of the models that come with the package."""


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
    for source, fields in PUBLISHED.items():
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
