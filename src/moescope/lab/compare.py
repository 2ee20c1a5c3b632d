"""Models side by side on the same text: how good, how fast, how costly, and how sure that is."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from moescope.engine.engine import Engine
from moescope.engine.sampling import SamplingParams
from moescope.errors import UserError
from moescope.lab.plan import plan
from moescope.machine import EnergyMeter, Machine
from moescope.scope.losses import document_losses
from moescope.scope.resampling import Interval, rate_interval, t_interval
from moescope.scope.saved import Saved
from moescope.scope.texts import check_resampling, encode, window_length
from moescope.text.documents import Document

PROMPT_BYTES = 600
NEW_TOKENS = 32
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Entrant:
    """A model that takes part.

    Attributes:
        name: what it is called.
        folder: where its `config.json` lies.
        engine: runs it.
        siblings: the same recipe trained with other seeds, in the order of seeds.
    """

    name: str
    folder: Path
    engine: Engine
    siblings: Sequence[Engine] = ()


@dataclass(frozen=True)
class Spread:
    """A quantity measured in several rounds: their median, smallest and largest."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise the rounds' values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Quality:
    """How well a model predicts text.

    Attributes:
        loss: nats a token; models with different tokenizers cannot be compared by it.
        bits_per_byte: bits that a UTF-8 byte of the text costs.
    """

    loss: Interval
    bits_per_byte: Interval


@dataclass(frozen=True)
class Result:
    """What was found out about one model.

    Attributes:
        name: what it is called.
        dtype: of its weights in memory.
        total_parameters, active_parameters: all, and those that work on one token.
        weight_bytes: of all weights in memory.
        weight_bytes_per_token: of the weights that work on a generated token.
        flops_per_token: operations of a generated token, without attention to earlier ones.
        cache_bytes_per_token: keys and values of one token in bf16.
        context: tokens that the model can see at once.
        memory_bytes: of all weights and the cache of a full context.
        quality: by domain.
        overall: of all text together.
        bytes_per_token: UTF-8 bytes of text that a token stands for, on average.
        prompt_tokens: of the text whose reading was timed.
        time_to_first_token: seconds from a prompt to the first token after it.
        time_per_token: seconds for each further token.
        joules_per_token: of the processors, for each further token; None where the machine does
            not tell.
        bits_of_seeds: bits a byte of all text, of each training of the recipe; empty where none
            was trained.
        window: tokens that were read at once; None in files of before.
    """

    name: str
    dtype: str
    total_parameters: int
    active_parameters: int
    weight_bytes: int
    weight_bytes_per_token: int
    flops_per_token: int
    cache_bytes_per_token: int
    context: int
    memory_bytes: int
    quality: dict[str, Quality]
    overall: Quality
    bytes_per_token: float
    prompt_tokens: int
    time_to_first_token: Spread
    time_per_token: Spread
    joules_per_token: Spread | None
    bits_of_seeds: list[float]
    window: int | None = None


@dataclass(frozen=True)
class Difference:
    """A model against the first one, on the same documents and in the same rounds.

    Attributes:
        name: of the model.
        bits_per_byte: its own minus the first one's, by domain; below zero it is better.
        overall: the same for all text together.
        time_to_first_token, time_per_token: its seconds over the first one's, round by round.
        over_seeds: bits a byte of all text, the mean over trainings with the same seed, with its
            95 % interval (Student's t); None unless there are two seeds or more.
    """

    name: str
    bits_per_byte: dict[str, Interval]
    overall: Interval
    time_to_first_token: Spread
    time_per_token: Spread
    over_seeds: Interval | None


@dataclass(frozen=True)
class Comparison(Saved):
    """Models side by side.

    Intervals hold in 95 of 100 samples of documents; they do not tell how much a model would
    change if it were trained again. `Difference.over_seeds` does.

    Attributes:
        version: of moescope.
        machine: the processor.
        threads: that computed.
        rounds: in which every model was timed once.
        documents: of each domain.
        text_bytes: of each domain.
        results: one for each model, in the order given.
        differences: of each but the first from the first.
        command: that measured it, if one did.
        held_out: domain -> whether no model was trained on its text, as far as models remember;
            empty where nobody asked.
    """

    noun: ClassVar[str] = "a comparison"

    version: str
    machine: str
    threads: int
    rounds: int
    documents: dict[str, int]
    text_bytes: dict[str, int]
    results: list[Result]
    differences: list[Difference]
    command: str = ""
    held_out: dict[str, bool] = field(default_factory=dict[str, bool])


def compare(
    entrants: Sequence[Entrant],
    documents: Sequence[Document],
    *,
    rounds: int,
    window: int | None = None,
    progress: Callable[[str], None],
) -> Comparison:
    """Measure every model on the same documents, and time them in turns.

    Each round times every model once, in an order that rotates, so that what else the machine
    does falls on all alike; a first round warms up and is not counted. Timed is greedy
    generation of 32 tokens after the first 600 bytes of text, the same for every model; after
    fewer where a model's context is short.

    A model whose tokenizer has no begin token does not predict a document's first token, which
    favours it slightly.

    Args:
        entrants: two or more.
        documents: as `scope.texts.labelled_text` returns them.
        rounds: how often to time each model.
        window: tokens that each model reads at once; `scope.texts.window_length` of each where it
            is left out.
        progress: told what is being done.

    Raises:
        UserError: two models have the same name, a model's context is too short to be timed, or
            a domain has a single document.
    """
    check_resampling(documents)
    names = [entrant.name for entrant in entrants]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} is named twice; name models that differ")
    losses: list[Floats] = []
    tokens: list[npt.NDArray[np.int64]] = []
    for entrant in entrants:
        progress(f"reading with {entrant.name}")
        encoded = encode(entrant.engine.tokenizer, documents)
        losses.append(document_losses(entrant.engine.model, encoded, window))
        tokens.append(np.array([len(ids) - 1 for ids in encoded]))
    sizes = np.array([len(document.text.encode()) for document in documents])
    chosen = _by_domain(documents)
    seconds = _time_in_turns(entrants, _prompt(entrants, documents), rounds, progress)
    bits = [
        _bits_of_seeds(entrant, nats, documents, window, progress)
        for entrant, nats in zip(entrants, losses, strict=True)
    ]
    machine = Machine.detect()
    return Comparison(
        version=version("moescope"),
        machine=machine.cpu,
        threads=machine.torch_threads,
        rounds=rounds,
        documents={domain: int(mine.sum()) for domain, mine in chosen.items()},
        text_bytes={domain: int(sizes[mine].sum()) for domain, mine in chosen.items()},
        results=[
            _result(*measured, sizes, chosen, window)
            for measured in zip(entrants, losses, tokens, seconds, bits, strict=True)
        ],
        differences=[
            _difference(
                names[i],
                losses[i] - losses[0],
                sizes,
                chosen,
                (seconds[i], seconds[0]),
                (bits[i], bits[0]),
            )
            for i in range(1, len(entrants))
        ],
    )


@dataclass(frozen=True)
class _Timed:
    """Seconds of each round, and joules where they are known; `prompt_tokens` were read."""

    prompt_tokens: int
    first: list[float]
    further: list[float]
    joules: list[float]


def _by_domain(documents: Sequence[Document]) -> dict[str, npt.NDArray[np.bool_]]:
    """Which documents are a domain's, `(documents,)`."""
    labels = np.array([document.domain for document in documents])
    return {str(domain): labels == domain for domain in np.unique(labels)}


def _prompt(entrants: Sequence[Entrant], documents: Sequence[Document]) -> str:
    """The first bytes of the text, as many as leave every model room for what is timed."""
    text = "\n".join(document.text for document in documents)
    prompt = text.encode()[:PROMPT_BYTES].decode(errors="ignore")
    for entrant in entrants:
        context = entrant.engine.model.config.max_position_embeddings
        tokenizer = entrant.engine.tokenizer
        while len(tokenizer.encode(prompt, add_special_tokens=True)) + NEW_TOKENS > context:
            if not prompt:
                raise UserError(
                    f"{entrant.name} has a context of {context} tokens, too short to time "
                    f"{NEW_TOKENS} new ones; leave it out"
                )
            prompt = prompt[: len(prompt) // 2]
    return prompt


def _time_in_turns(
    entrants: Sequence[Entrant], prompt: str, rounds: int, progress: Callable[[str], None]
) -> list[_Timed]:
    timed = [_Timed(len(entrant.engine.encode(prompt)), [], [], []) for entrant in entrants]
    for number in range(rounds + 1):
        progress(f"timing, round {number} of {rounds}" if number else "warming up")
        for turn in range(len(entrants)):
            at = (number + turn) % len(entrants)
            first, further, joules = _time(entrants[at].engine, prompt)
            if number:
                timed[at].first.append(first)
                timed[at].further.append(further)
                if joules is not None:
                    timed[at].joules.append(joules)
    return timed


def _time(engine: Engine, prompt: str) -> tuple[float, float, float | None]:
    """Seconds to the first token; seconds and joules on average for each of those after it."""
    endless = Engine(engine.model, engine.tokenizer)
    endless.end_ids = frozenset()
    ids = endless.encode(prompt)
    moments, meter = [time.perf_counter()], EnergyMeter()
    for _ in endless.repeat([ids], SamplingParams(max_tokens=NEW_TOKENS)):
        moments.append(time.perf_counter())
        if len(moments) == 2:
            meter = EnergyMeter()
    joules, further = meter.joules(), NEW_TOKENS - 1
    return (
        moments[1] - moments[0],
        (moments[-1] - moments[1]) / further,
        None if joules is None else joules / further,
    )


def _bits_of_seeds(
    entrant: Entrant,
    nats: Floats,
    documents: Sequence[Document],
    window: int | None,
    progress: Callable[[str], None],
) -> list[float]:
    """Bits a byte of all text, of an entrant and its siblings; none if it has no siblings."""
    if not entrant.siblings:
        return []
    of_seeds = [nats]
    for number, engine in enumerate(entrant.siblings, start=1):
        progress(f"reading with {entrant.name}, seed {number}")
        encoded = encode(engine.tokenizer, documents)
        of_seeds.append(document_losses(engine.model, encoded, window))
    size = sum(len(document.text.encode()) for document in documents)
    return [float(losses.sum()) / math.log(2) / size for losses in of_seeds]


def _result(
    entrant: Entrant,
    nats: Floats,
    tokens: npt.NDArray[np.int64],
    timed: _Timed,
    bits_of_seeds: list[float],
    sizes: npt.NDArray[np.int64],
    chosen: dict[str, npt.NDArray[np.bool_]],
    window: int | None,
) -> Result:
    planned, model = plan(entrant.folder), entrant.engine.model
    dtype = model.lm_head.weight.dtype
    active = planned.parameters.active_without_embedding
    weight_bytes = planned.parameters.total * dtype.itemsize
    return Result(
        name=entrant.name,
        dtype=str(dtype).removeprefix("torch."),
        total_parameters=planned.parameters.total,
        active_parameters=planned.parameters.active,
        weight_bytes=weight_bytes,
        weight_bytes_per_token=active * dtype.itemsize,
        flops_per_token=planned.work.weight_flops,
        cache_bytes_per_token=planned.cache.bytes_per_token,
        context=planned.cache.max_context,
        memory_bytes=weight_bytes + planned.cache.bytes_at_max_context,
        quality={
            domain: _quality(nats[mine], tokens[mine], sizes[mine])
            for domain, mine in chosen.items()
        },
        overall=_quality(nats, tokens, sizes),
        bytes_per_token=float(sizes.sum() / tokens.sum()),
        prompt_tokens=timed.prompt_tokens,
        time_to_first_token=Spread.of(timed.first),
        time_per_token=Spread.of(timed.further),
        joules_per_token=Spread.of(timed.joules) if timed.joules else None,
        bits_of_seeds=bits_of_seeds,
        window=window_length(model, window),
    )


def _quality(nats: Floats, tokens: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Quality:
    return Quality(rate_interval(nats, tokens), rate_interval(nats / math.log(2), sizes))


def _difference(
    name: str,
    nats: Floats,
    sizes: npt.NDArray[np.int64],
    chosen: dict[str, npt.NDArray[np.bool_]],
    timed: tuple[_Timed, _Timed],
    of_seeds: tuple[list[float], list[float]],
) -> Difference:
    """Ours against the first one's: `timed` and `of_seeds` hold both, in this order."""
    bits = nats / math.log(2)
    ours, theirs = timed
    by_seed = [one - other for one, other in zip(*of_seeds, strict=False)]
    return Difference(
        name=name,
        bits_per_byte={
            domain: rate_interval(bits[mine], sizes[mine]) for domain, mine in chosen.items()
        },
        overall=rate_interval(bits, sizes),
        time_to_first_token=_ratio(ours.first, theirs.first),
        time_per_token=_ratio(ours.further, theirs.further),
        over_seeds=t_interval(by_seed) if len(by_seed) > 1 else None,
    )


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    return Spread.of([one / other for one, other in zip(ours, theirs, strict=True)])
