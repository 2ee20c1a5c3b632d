"""Which experts served which tokens: what a pass chose, dealt out to the texts that were in it."""

from collections.abc import Iterable, Sequence
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.scheduler import Chunk
from moescope.engine.sequence import RoutedTokens
from moescope.kernels.cpu import Chosen
from moescope.model.recorder import Recorder
from moescope.model.routing import UNUSED, Routing


class RoutingRecorder(Recorder):
    """Keeps what each router of one pass chose."""

    wants_routing_alone = True

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor, Tensor]] = []  # (tokens, slots) each

    def routing(self, layer_idx: int, routing: Routing) -> None:
        """See what the router of a layer decided."""
        ids = routing.topk_ids
        scores = routing.scores.float().gather(1, ids.clamp(min=0)).masked_fill(ids == UNUSED, 0.0)
        weights = routing.topk_weights.float()
        self._layers.append((ids.cpu(), weights.cpu(), scores.cpu()))

    def chosen(self) -> Chosen | None:
        """Return it, and forget it; None where there is no router."""
        layers, self._layers = self._layers, []
        if not layers:
            return None
        slots = max(ids.shape[1] for ids, _, _ in layers)

        def stacked(parts: Iterable[Tensor], value: int = 0) -> Tensor:
            padded = [F.pad(part, (0, slots - part.shape[1]), value=value) for part in parts]
            return torch.stack(padded)

        ids, weights, scores = zip(*layers, strict=True)
        return Chosen(stacked(ids, UNUSED), stacked(weights), stacked(scores))


COUNTED_AT_ONCE = 256
"""Tokens whose choices are kept before they are counted: a count takes as long as some kernels."""


class ExpertLoad:
    """Counts how many tokens each expert of each layer has been given; any thread may ask.

    Args:
        layers: that have routers, by index.
        experts: of each.

    Attributes:
        layers: as given.
    """

    def __init__(self, layers: Sequence[int], experts: int) -> None:
        self.layers = tuple(layers)
        self._tokens = torch.zeros(len(self.layers), experts, dtype=torch.int64)
        self._uncounted: list[Tensor] = []  # (layers, tokens, slots) each
        self._waiting = 0
        self._lock = Lock()

    @property
    def tokens(self) -> Tensor:
        """Counts, `(layers, experts)` int64."""
        with self._lock:
            self._count_all()
            return self._tokens.clone()

    def add(self, chosen: Chosen) -> None:
        """Count what a pass chose."""
        with self._lock:
            self._uncounted.append(chosen.ids)
            self._waiting += chosen.ids.shape[1]
            if self._waiting >= COUNTED_AT_ONCE:
                self._count_all()

    def _count_all(self) -> None:
        if not self._uncounted:
            return
        ids = torch.cat([one.flatten(1) for one in self._uncounted], dim=1)  # (layers, any slots)
        self._uncounted.clear()
        self._waiting = 0
        layers, experts = self._tokens.shape
        bins = 1 + experts  # the first for slots without an expert
        first = torch.arange(layers)[:, None] * bins + 1
        counts = (ids + first).flatten().bincount(minlength=layers * bins)
        self._tokens += counts.view(layers, bins)[:, 1:]


def deal_out(chosen: Chosen, chunks: Sequence[Chunk], layers: tuple[int, ...]) -> None:
    """Give each text that asks for it what was chosen for its tokens, each of them once.

    Args:
        chosen: in a pass over the chunks, one after the other; with weights and scores if one asks.
        chunks: that were read.
        layers: that have routers, by index.
    """
    first = 0
    for chunk in chunks:
        sequence, last = chunk.sequence, first + chunk.count
        known = sequence.routed_tokens - chunk.start  # where a text is read again
        if sequence.params.routed_experts and known < chunk.count:
            at = slice(first + known, last)
            ids, weights, scores = chosen.ids[:, at], chosen.weights, chosen.scores
            assert weights is not None and scores is not None
            # An expert never follows an empty slot.
            slots = int((ids != UNUSED).any(0).any(0).sum())
            sequence.add_routed(
                RoutedTokens(
                    chunk.start + known,
                    layers,
                    ids[..., :slots].transpose(0, 1).to(torch.int16),
                    weights[:, at, :slots].transpose(0, 1).clone(),
                    scores[:, at, :slots].transpose(0, 1).clone(),
                )
            )
        first = last
