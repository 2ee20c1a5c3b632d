"""What a model asks of a machine, from its config and its files' headers: no weight is read.

Nothing is measured either, unless the speed is asked for.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from moescope.catalog import Entry, catalog
from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.families import config_fields, open_config
from moescope.formats.gguf.model import is_gguf
from moescope.formats.headers import Headers
from moescope.formats.repository import is_hub_name
from moescope.lab.speed import PROMPT, Prediction, number_bytes, predict
from moescope.lab.stored import Stored, local_headers
from moescope.machine import Machine
from moescope.model.costs import (
    Parameters,
    attention_flops,
    cached_numbers,
    count_parameters,
    held_numbers,
    plain_numbers,
    weight_flops,
)
from moescope.native.weight_format import BITS_PER_WEIGHT, BLOCK_FORMATS, cache_bytes
from moescope.scope.saved import Saved

CONTEXT = 4096
"""Tokens before the one whose work is counted; fewer where a model cannot have so many."""
PUBLISHED_CACHE_BYTES = 2
"""Of a number in the cache, as papers count it."""
STORED = "stored"
"""The format that a checkpoint's own types are called, which the native kernels compute with."""


@dataclass(frozen=True)
class Bytes:
    """A number of bytes for each format of the weights.

    int8 stands for fp8 too; its scales, one a row or a block, weigh under 1 % and are not counted.
    """

    bf16: int
    int8: int
    int4: int

    @classmethod
    def of(cls, parameters: int, cached: Mapping[str, int]) -> "Bytes":
        """Return the bytes of so many weights, and of the cache beside each format of them."""
        return cls(
            **{
                name: int(parameters * bits / 8) + cached.get(name, 0)
                for name, bits in BITS_PER_WEIGHT.items()
            }
        )


@dataclass(frozen=True)
class Cache:
    """The key-value cache, in bf16.

    Attributes:
        bytes_per_token: what has to be kept of each token of a long text (`cached_numbers`).
        engine_bytes_per_token: what moescope keeps (`held_numbers`), by the format of the weights
            (`number_bytes`).
        max_context: tokens that the model was made for.
        bytes_at_max_context: for one text of that length.
        plain_bytes_per_token: what plain attention would keep: a key and a value for each head,
            without rotated parts of their own (DeepSeek-V2, table 1).
    """

    bytes_per_token: int
    engine_bytes_per_token: dict[str, int]
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
        format: of the weights: `stored`, where files say how, or one of `Bytes`.
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
        stored: how the checkpoint's files hold the weights, where there are such.
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
    stored: Stored | None
    fits: tuple[Fit, ...]
    version: str
    speed: Prediction | None = None
    command: str = ""

    def weights_in(self, weight_format: str) -> int:
        """Return the bytes of all weights in a format: `stored`, or one of `Bytes`."""
        if self.stored is not None and weight_format == STORED:
            return self.stored.bytes
        return getattr(self.weights, weight_format)

    def bytes_read_in(self, weight_format: str) -> int:
        """Return the bytes that memory has to deliver for a token, by the format of the weights."""
        if self.stored is not None and weight_format == STORED:
            cached = self.cache.engine_bytes_per_token[STORED] * self.work.context
            return self.stored.active_bytes + cached
        return getattr(self.work.bytes_read, weight_format)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {**dataclasses.asdict(self), "config": config_fields(self.config)}


def plan(name_or_path: str | Path, *, speed: bool = False, prompt: int = PROMPT) -> Plan:
    """Work out parameters, memory and work of a model, and whether it fits here.

    Args:
        name_or_path: a name of the catalog; a folder with `config.json`, such a file, or a GGUF
            file; or a Hub name, also `org/repo:Q4_K_M`. Of files the headers alone are read, on
            the Hub by requests for these parts.
        speed: also time a sample of the model on this machine, for some seconds.
        prompt: tokens before those that are generated then.

    Raises:
        UserError: there is no such name or file, or what it holds is damaged or unknown.
    """
    source, config, headers = _find(str(name_or_path))
    parameters = count_parameters(config)
    stored = None if headers is None else Stored.of(headers)
    weights = Bytes.of(parameters.total, {})
    cache = _cache(config, stored)
    work = _work(config, parameters, cache)
    held = dataclasses.asdict(weights)
    if stored is not None:
        held = {STORED: stored.bytes, **held}
    return Plan(
        name=str(name_or_path),
        source=source,
        config=config,
        parameters=parameters,
        weights=weights,
        cache=cache,
        work=work,
        stored=stored,
        fits=_fits(Machine.detect(), held, cache, work.context),
        version=version("moescope"),
        speed=predict(config, prompt) if speed else None,
    )


def _find(name: str) -> tuple[str, ModelConfig, Headers | None]:
    """Return where a config is from, the config, and headers; a file goes before a name."""
    path = Path(name)
    if path.exists() and (is_gguf(path) or (path / "config.json").is_file()):
        return _local(path)
    if path.is_file():
        return str(path), open_config(path), None
    entries = catalog()
    by_name = entries | {entry.source.lower(): entry for entry in entries.values()}
    entry = by_name.get(name.lower())
    if is_hub_name(name):
        return _on_hub(name, entry)
    if entry is not None:
        return entry.source, entry.config, None
    if path.is_dir():
        raise UserError(f"there is no config.json in {name}; name a folder that holds one")
    close = difflib.get_close_matches(name.lower(), entries)
    meant = f"did you mean {' or '.join(close)}? Else " if close else ""
    raise UserError(
        f"there is no model {name!r}; {meant}give a folder with config.json, a .gguf file, a Hub "
        f"name, or one of {', '.join(entries)}"
    )


def _local(path: Path) -> tuple[str, ModelConfig, Headers | None]:
    """Read a folder or a GGUF file."""
    if is_gguf(path):
        headers = local_headers(path, None)
        assert headers is not None
        return str(path), headers.config, headers
    config = open_config(path / "config.json")
    return str(path / "config.json"), config, local_headers(path, config)


def _on_hub(name: str, entry: Entry | None) -> tuple[str, ModelConfig, Headers | None]:
    """Ask the Hub; without it, what was downloaded before, or the catalog, may answer."""
    from moescope.formats import hub

    try:
        found = hub.HubModel(name)
        headers = found.headers()
    except hub.Unavailable:
        if (path := hub.cached(name)) is not None:
            return _local(path)
        if entry is not None:
            return entry.source, entry.config, None
        raise
    return f"{found.repo}: {found.choice.main}", headers.config, headers


def _cache(config: ModelConfig, stored: Stored | None) -> Cache:
    bytes_of_number = PUBLISHED_CACHE_BYTES * config.num_hidden_layers
    bytes_per_token = cached_numbers(config) * PUBLISHED_CACHE_BYTES
    held = held_numbers(config)
    # Of the matrices that make keys; a type that the kernels lack is rounded to eight bits.
    kind = next(iter(stored.parts.get("attention", {}) if stored else {}), "")
    engine = {name: number_bytes(config, name) for name in BITS_PER_WEIGHT}
    engine[STORED] = cache_bytes(config, BLOCK_FORMATS.get(kind, "int8"))
    return Cache(
        bytes_per_token=bytes_per_token,
        engine_bytes_per_token={name: held * size for name, size in engine.items()},
        max_context=config.max_position_embeddings,
        bytes_at_max_context=bytes_per_token * config.max_position_embeddings,
        plain_bytes_per_token=plain_numbers(config) * bytes_of_number,
    )


def _work(config: ModelConfig, parameters: Parameters, cache: Cache) -> Work:
    context = min(CONTEXT, config.max_position_embeddings)
    return Work(
        context=context,
        weight_flops=weight_flops(parameters),
        generating_attention_flops=attention_flops(config, context, reading=False),
        reading_attention_flops=attention_flops(config, context, reading=True),
        bytes_read=Bytes.of(
            parameters.active_without_embedding,
            {name: held * context for name, held in cache.engine_bytes_per_token.items()},
        ),
    )


def _fits(machine: Machine, weights: dict[str, int], cache: Cache, context: int) -> tuple[Fit, ...]:
    places = {"memory": machine.memory_available}
    if machine.gpu is not None and machine.gpu_memory_total is not None:
        places[machine.gpu] = machine.gpu_memory_total
    fits: list[Fit] = []
    for place, room in places.items():
        for kind, held in weights.items():
            per_token = cache.engine_bytes_per_token[kind]
            needed = held + per_token * context
            longest = min((room - held) // per_token, cache.max_context)
            fits.append(Fit(place, room, kind, needed, needed <= room, max(longest, 0)))
    return tuple(fits)
