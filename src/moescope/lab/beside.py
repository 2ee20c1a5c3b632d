"""Models on the same few tokens: what each says, costs, and how long it takes right now."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moescope.engine.engine import Engine
from moescope.model.balancing import chosen_experts
from moescope.model.cache import Cache
from moescope.model.costs import count_parameters, weight_flops
from moescope.scope.bytes import WeightBytes
from moescope.scope.recording import TraceRecorder
from moescope.scope.steps import describe
from moescope.scope.trace import Candidate

MOST_TIMED = 32
"""Tokens that are timed at most."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, in numbers of weights."""

    total: int
    active: int


@dataclass(frozen=True)
class Contestant:
    """One model on one text.

    Attributes:
        name: what it was loaded as.
        parameters: all, and those at work on a token.
        losses: nats per token, from the second token on.
        flops_per_token: of generating one token with an empty context; two for every weight that
            multiplies it.
        bytes_per_token: of the matrices that are read for a token of the text, in the formats
            they are held in; the mean.
        milliseconds_per_token: median over the text's first tokens, measured now, one token at a
            time.
        next_tokens: what it says comes after the text, likeliest first.
    """

    name: str
    parameters: ParameterCount
    losses: list[float]
    flops_per_token: int
    bytes_per_token: int
    milliseconds_per_token: float
    next_tokens: list[Candidate]


def beside(engines: dict[str, Engine], ids: Sequence[int]) -> list[Contestant]:
    """Run models that share a vocabulary on the same ids.

    Args:
        engines: by name.
        ids: a text.

    Raises:
        UserError: the ids are no text for one of them.
    """
    for engine in engines.values():
        engine.check(ids)
    milliseconds = _time_in_turns(list(engines.values()), ids[:MOST_TIMED])
    return [
        _contestant(name, engine, ids, taken)
        for (name, engine), taken in zip(engines.items(), milliseconds, strict=True)
    ]


@torch.inference_mode()
def expert_loads(engine: Engine, ids: Sequence[int]) -> dict[int, list[float]]:
    """Share of a text's routed slots that each expert serves, by layer; no experts, no layers.

    Args:
        engine: of the model that reads it.
        ids: a text.

    Raises:
        UserError: the ids are no text for the model.
    """
    engine.check(ids)
    recorder = TraceRecorder()
    engine.model(torch.tensor([list(ids)], device=engine.device), recorder=recorder)
    loads: dict[int, list[float]] = {}
    for layer_idx, routing in recorder.routings.items():
        counts = chosen_experts(routing.topk_ids, routing.scores.shape[-1]).sum(dim=0)  # (experts,)
        loads[layer_idx] = (counts / counts.sum().clamp(min=1)).tolist()
    return loads


@torch.inference_mode()
def _contestant(name: str, engine: Engine, ids: Sequence[int], milliseconds: float) -> Contestant:
    parameters = count_parameters(engine.model.config)
    recorder = TraceRecorder()
    engine.model(torch.tensor([list(ids)], device=engine.device), recorder=recorder)
    steps = describe(engine.model, engine.tokenizer, recorder, ids)
    read = WeightBytes.of(engine.model).read(recorder.routings, len(ids))
    return Contestant(
        name=name,
        parameters=ParameterCount(parameters.total, parameters.active),
        losses=[-step.logprob for step in steps if step.logprob is not None],
        flops_per_token=weight_flops(parameters),
        bytes_per_token=round(float(read.float().mean())),
        milliseconds_per_token=milliseconds,
        next_tokens=steps[-1].candidates,
    )


@torch.inference_mode()
def _time_in_turns(engines: list[Engine], ids: Sequence[int]) -> list[float]:
    """Milliseconds per token of each; they take turns, so that all meet the same moments."""
    caches = [Cache() for _ in engines]
    taken: list[list[float]] = [[] for _ in engines]
    for place, token_id in enumerate(ids):
        for turn in range(len(engines)):
            at = (place + turn) % len(engines)
            engine = engines[at]
            input_ids = torch.tensor([[token_id]], device=engine.device)
            position = torch.tensor([[place]], device=engine.device)
            start = time.perf_counter()
            states = engine.model(input_ids, position, caches[at])  # (1, 1, hidden)
            engine.model.logits(states[:, -1]).argmax().item()  # waits for the device, too
            taken[at].append(1000 * (time.perf_counter() - start))
    return [statistics.median(each) for each in taken]
