"""What a model asks of a machine, from its config alone: nothing is downloaded.

Nothing is measured either, unless the speed is asked for.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from moescope.catalog import Parameters, catalog, count_parameters
from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.families import config_fields, open_config
from moescope.formats.gguf.model import GgufModel, is_gguf
from moescope.lab.speed import PROMPT, Prediction, predict
from moescope.lab.widths import cached_numbers, cached_width, expanded_width, plain_numbers
from moescope.machine import Machine
from moescope.scope.saved import Saved

CONTEXT = 4096
"""Tokens before the one whose work is counted; fewer where a model cannot have so many."""
CACHE_BYTES = 2
"""The cache holds bf16."""
BITS_PER_WEIGHT = {"bf16": 16.0, "int8": 8.0, "int4": 4.5}
"""int8 stands for fp8 too; its scales, one a row or a block, weigh under 1 % and are not counted.
int4 has a 16-bit scale for each 32 weights."""


@dataclass(frozen=True)
class Bytes:
    """A number of bytes for each format of the weights."""

    bf16: int
    int8: int
    int4: int

    @classmethod
    def of(cls, parameters: int, *, plus: int = 0) -> "Bytes":
        """Return the bytes of so many weights, plus those of something else."""
        return cls(
            **{name: int(parameters * bits / 8) + plus for name, bits in BITS_PER_WEIGHT.items()}
        )


@dataclass(frozen=True)
class Cache:
    """The key-value cache, in bf16.

    Attributes:
        bytes_per_token: latent attention keeps `kv_lora_rank + qk_rope_head_dim` numbers a layer,
            grouped-query attention a key and a value for each key-value head.
        max_context: tokens that the model was made for.
        bytes_at_max_context: for one text of that length.
        plain_bytes_per_token: what plain attention would keep: a key and a value for each head,
            without rotated parts of their own (DeepSeek-V2, table 1).
    """

    bytes_per_token: int
    max_context: int
    bytes_at_max_context: int
    plain_bytes_per_token: int


@dataclass(frozen=True)
class Work:
    """What one token costs; a multiplication and an addition are two operations.

    Attributes:
        context: tokens before the generated one, or in the prompt that is read.
        weight_flops: two operations for every weight that multiplies the token.
        generating_attention_flops: of a token that looks back at `context` others in the cache.
            Latent attention does so in the latent space (DeepSeek-V2, section 2.1.2).
        reading_attention_flops: the mean over the tokens of a prompt of `context` tokens, each of
            which looks back at those before it, with keys and values expanded.
        bytes_read: weights that work on a generated token, and the cache of `context` tokens:
            what memory has to deliver for each.
    """

    context: int
    weight_flops: int
    generating_attention_flops: int
    reading_attention_flops: int
    bytes_read: Bytes

    @property
    def generating_flops(self) -> int:
        """Operations of a generated token."""
        return self.weight_flops + self.generating_attention_flops

    @property
    def reading_flops(self) -> int:
        """Operations of a token of the prompt, on average."""
        return self.weight_flops + self.reading_attention_flops


@dataclass(frozen=True)
class Fit:
    """Whether weights of one format, and a cache, fit into one memory of this machine.

    Attributes:
        place: `memory`, or the GPU's name.
        room: bytes that are there: of memory what is free now, of a GPU all it has.
        format: of the weights.
        needed: bytes of the weights and of the cache of `Work.context` tokens.
        fits: whether they fit.
        longest_context: tokens whose cache fits beside the weights, up to the model's most.
    """

    place: str
    room: int
    format: str
    needed: int
    fits: bool
    longest_context: int


@dataclass(frozen=True)
class Plan(Saved):
    """The answer to "can I run it, and what will it cost?".

    Attributes:
        name: as asked for.
        source: where the config is from.
        config: the shape.
        parameters: how many, and where.
        weights: bytes of all weights, without multi-token prediction.
        cache: of keys and values.
        work: of one token.
        fits: for each memory of this machine and each format.
        version: of moescope.
        speed: what to expect of this machine, if that was asked for.
        command: that planned, if one did.
    """

    noun: ClassVar[str] = "a plan"

    name: str
    source: str
    config: ModelConfig
    parameters: Parameters
    weights: Bytes
    cache: Cache
    work: Work
    fits: tuple[Fit, ...]
    version: str
    speed: Prediction | None = None
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {**dataclasses.asdict(self), "config": config_fields(self.config)}


def plan(name_or_path: str | Path, *, speed: bool = False, prompt: int = PROMPT) -> Plan:
    """Work out parameters, memory and work of a model, and whether it fits here.

    Args:
        name_or_path: a name of the catalog, a Hub name in it, a folder with `config.json`, such
            a file, or a GGUF file, of which only the header is read.
        speed: also time a sample of the model on this machine, for some seconds.
        prompt: tokens before those that are generated then.

    Raises:
        UserError: there is no such name or file, or the config is wrong.
    """
    source, config = _find(str(name_or_path))
    parameters = count_parameters(config)
    weights = Bytes.of(parameters.total)
    cache = _cache(config)
    work = _work(config, parameters, cache)
    return Plan(
        name=str(name_or_path),
        source=source,
        config=config,
        parameters=parameters,
        weights=weights,
        cache=cache,
        work=work,
        fits=_fits(Machine.detect(), weights, cache, work.context),
        version=version("moescope"),
        speed=predict(config, prompt) if speed else None,
    )


def _find(name: str) -> tuple[str, ModelConfig]:
    """Return where a config is from, and the config; a file goes before a name."""
    path = Path(name)
    if is_gguf(path) and path.is_file():
        return str(path), GgufModel(path).config
    for file in (path / "config.json", path):
        if file.is_file():
            return str(file), open_config(file)
    entries = catalog()
    by_name = entries | {entry.source.lower(): entry for entry in entries.values()}
    if entry := by_name.get(name.lower()):
        return entry.source, entry.config
    if path.is_dir():
        raise UserError(f"there is no config.json in {name}; name a folder that holds one")
    close = difflib.get_close_matches(name.lower(), entries)
    meant = f"did you mean {' or '.join(close)}? Else " if close else ""
    raise UserError(
        f"there is no model {name!r}; {meant}give a folder with config.json, or one of "
        f"{', '.join(entries)}"
    )


def _cache(config: ModelConfig) -> Cache:
    bytes_of_number = CACHE_BYTES * config.num_hidden_layers
    bytes_per_token = cached_numbers(config) * bytes_of_number
    return Cache(
        bytes_per_token=bytes_per_token,
        max_context=config.max_position_embeddings,
        bytes_at_max_context=bytes_per_token * config.max_position_embeddings,
        plain_bytes_per_token=plain_numbers(config) * bytes_of_number,
    )


def _work(config: ModelConfig, parameters: Parameters, cache: Cache) -> Work:
    context = min(CONTEXT, config.max_position_embeddings)
    products = config.num_hidden_layers * config.num_attention_heads * context
    return Work(
        context=context,
        weight_flops=2 * (parameters.active_without_embedding - parameters.norm),
        generating_attention_flops=2 * products * cached_width(config),
        reading_attention_flops=products * expanded_width(config),
        bytes_read=Bytes.of(
            parameters.active_without_embedding, plus=cache.bytes_per_token * context
        ),
    )


def _fits(machine: Machine, weights: Bytes, cache: Cache, context: int) -> tuple[Fit, ...]:
    places = {"memory": machine.memory_available}
    if machine.gpu is not None and machine.gpu_memory_total is not None:
        places[machine.gpu] = machine.gpu_memory_total
    fits: list[Fit] = []
    for place, room in places.items():
        for kind, held in dataclasses.asdict(weights).items():
            needed = held + cache.bytes_per_token * context
            longest = min((room - held) // cache.bytes_per_token, cache.max_context)
            fits.append(Fit(place, room, kind, needed, needed <= room, max(longest, 0)))
    return tuple(fits)
