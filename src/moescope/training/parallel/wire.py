"""What a placement sends from rank to rank in a step, counted from config and shape alone.

Counted is what has to leave a rank, whatever algorithm carries it: to gather parts from n ranks
each sends its own to n - 1, to scatter sums likewise, and to have a sum everywhere takes both
(Thakur et al. 2005, section 4). What is told in a few numbers a layer (loads, how many rows come,
norms) is left out. `placement` and `dispatch` are what is counted here, and a test holds one to the
other.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import nn

from moescope.config import ModelConfig
from moescope.model.decoder import without_numbers
from moescope.model.routing import ROUTERS
from moescope.training.config import ParallelConfig
from moescope.training.optimizer import is_hidden_matrix
from moescope.training.parallel.placement import expert_dimension

FLOAT32, INT64 = 4, 8
"""Bytes of a number."""
NOISE = 8192
"""Tokens whose scores are drawn."""


@dataclass(frozen=True)
class Wire:
    """Bytes that all ranks together send to others in a step.

    Attributes:
        dispatch: tokens with ids and weights of their experts, and gradients back.
        combine: sums of experts, and gradients back.
        weights: parts of weights that are gathered for a layer's passes (FSDP's all-gather).
        gradients: sums of gradients to the ranks that hold the parts (reduce-scatter).
        copies: sums of gradients of what is the same on all ranks of `expert` (all-reduce).
        matrices: gradients that Muon gathers, since it needs whole matrices.
    """

    dispatch: float
    combine: float
    weights: float
    gradients: float
    copies: float
    matrices: float

    @property
    def over_expert(self) -> float:
        """What goes between ranks of `expert`."""
        return self.dispatch + self.combine + self.copies

    @property
    def over_data(self) -> float:
        """What goes between ranks of `data`."""
        return self.weights + self.gradients + self.matrices

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def wire(
    config: ModelConfig,
    parallel: ParallelConfig,
    *,
    parts: int,
    crossings: float,
    number: int,
    muon: bool,
) -> Wire:
    """Count a step.

    Args:
        config: of the network.
        parallel: how it is dealt.
        parts: micro batches that follow one another.
        crossings: visits of tokens to other ranks, summed over tokens and layers.
        number: bytes of a number that the network computes with.
        muon: whether Muon moves the matrices.
    """
    data, expert, ranks = parallel.data, parallel.expert, parallel.ranks
    held = list(_held(config, parallel, muon))
    gathered = sum(part.numbers * part.gathers for part in held) * number
    learned = sum(part.numbers for part in held if part.learns)
    copied = sum(part.numbers for part in held if part.learns and not part.is_expert)
    whole = sum(part.numbers for part in held if muon and part.is_matrix and part.learns)
    slots, row = config.num_experts_per_tok or 0, config.hidden_size * number
    return Wire(
        dispatch=crossings * (2 * row + slots * (INT64 + 2 * FLOAT32)),
        combine=crossings * 2 * row,
        weights=parts * ranks * (data - 1) * gathered,
        gradients=parts * ranks * (data - 1) * learned * FLOAT32,
        copies=parts * data * 2 * (expert - 1) * copied * FLOAT32,
        matrices=ranks * (data - 1) * whole * FLOAT32,
    )


def numbers_held(config: ModelConfig, parallel: ParallelConfig, *, muon: bool) -> int:
    """Count the weights that a rank holds; each has its gradients and moments beside it."""
    return sum(part.numbers for part in _held(config, parallel, muon))


@dataclass(frozen=True)
class _Held:
    """A rank's part of a parameter.

    Attributes:
        numbers: in it, with what fills it up where rows cannot be dealt evenly.
        gathers: how often a micro batch needs all of it: for a layer's passes forward and
            backward; embedding, head and what stands between stay from one to the other.
        is_expert: whether it belongs to routed experts, of which each rank of `expert` has others.
        is_matrix: whether Muon gathers it whole.
        learns: whether it has a gradient.
    """

    numbers: int
    gathers: int
    is_expert: bool
    is_matrix: bool
    learns: bool


def _held(config: ModelConfig, parallel: ParallelConfig, muon: bool) -> Iterator[_Held]:
    model = without_numbers(config)
    for name, parameter in model.named_parameters():
        is_expert = ".experts." in name
        yield _Held(
            numbers=_numbers(parameter, parallel, is_expert, muon),
            gathers=2 if name.startswith("model.layers.") or ".layer." in name else 1,
            is_expert=is_expert,
            is_matrix=parameter.ndim == 2 and is_hidden_matrix(name, parameter),
            learns=parameter.requires_grad,
        )


def _numbers(parameter: nn.Parameter, parallel: ParallelConfig, is_expert: bool, muon: bool) -> int:
    """Count a rank's part of a parameter, filled up to the largest of all ranks."""
    sizes = list(parameter.shape)
    dimension = 0
    if is_expert:
        sizes[0] //= parallel.expert
        dimension = expert_dimension(parameter.shape, parallel, muon=muon)
    sizes[dimension] = -(-sizes[dimension] // parallel.data)
    return math.prod(sizes)


def places_visited(config: ModelConfig, places: int) -> float:
    """Return how many of so many places, with as many experts each, a token visits in a layer.

    A place is a rank or a node. It is the mean over tokens whose scores are noise, so that all
    experts are alike; the router's own rule, with its groups, chooses.
    """
    experts = config.required("n_routed_experts")
    in_groups = config.topk_method in ("group_limited_greedy", "noaux_tc")
    gate = ROUTERS[config.topk_method if in_groups else "greedy"](config)
    scores = torch.rand(NOISE, experts, generator=torch.Generator().manual_seed(0))
    topk_ids, _ = gate.choose(scores, scores, torch.zeros(0))  # (tokens, slots)
    visited = torch.zeros(NOISE, places, dtype=torch.bool)
    return int(visited.scatter_(1, topk_ids * places // experts, True).sum()) / NOISE
