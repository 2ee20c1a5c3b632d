"""Routing replay (R3, Ma et al. 2025): the training pass takes the experts that the sampler chose.

Sampler and trainer compute with other kernels, orders or precisions. Where two experts' scores are
close, each may choose another, and the trained probabilities are those of other parameters than the
ones that drew the answer. With replay the choice is the sampler's, the weights of the chosen are
the trainer's own, and gradients reach the router through them.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moescope.model.decoder import CausalLM
from moescope.model.recorder import Recorder
from moescope.model.routing import UNUSED, Router, Routing
from moescope.model.steering import moe_layers

Choices = Mapping[int, Tensor]
"""Layer index -> `(tokens, slots)` int64, the chosen experts in batch-major order."""


class ReplayRouter(Router):
    """A gate that shares another's map and rule, but takes recorded choices."""

    def __init__(self, gate: Router, chosen: Tensor) -> None:
        nn.Module.__init__(self)
        self._rule, self._chosen = gate, chosen

    def logits(self, hidden_states: Tensor) -> Tensor:
        return self._rule.logits(hidden_states)

    def score(self, router_logits: Tensor) -> Tensor:
        return self._rule.score(router_logits)

    def choose(
        self, scores: Tensor, router_logits: Tensor, input_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._chosen, self._rule.weigh(scores, self._chosen)


@contextmanager
def replaying(model: CausalLM, choices: Choices) -> Generator[None]:
    """Let each mixture of `model` take the recorded choices while this is open."""
    mixtures = moe_layers(model)
    gates = {layer: mixtures[layer].gate for layer in choices}
    try:
        for layer, chosen in choices.items():
            mixtures[layer].gate = ReplayRouter(gates[layer], chosen)
        yield
    finally:
        for layer, gate in gates.items():
            mixtures[layer].gate = gate


class Disagreement(Recorder):
    """Counts the choices that the trainer, left to itself, makes otherwise than the sampler.

    Args:
        model: in training; its own rules choose, also where a choice is replayed.
        choices: the sampler's.
        read: `(rows, seq)` bool, which tokens count.

    Attributes:
        differing: slots whose expert the sampler did not choose.
        slots: compared in all.
    """

    def __init__(self, model: CausalLM, choices: Choices, read: Tensor) -> None:
        self._gates = {layer: moe.gate for layer, moe in moe_layers(model).items()}
        self._choices, self._read = choices, read.flatten()
        self.differing = self.slots = 0

    @torch.no_grad()
    def routing(self, layer_idx: int, routing: Routing) -> None:
        if layer_idx not in self._choices:
            return
        gate, kept = self._gates[layer_idx], self._read
        no_ids = torch.zeros(0, dtype=torch.int64)
        own, _ = gate.choose(routing.scores[kept], routing.router_logits[kept], no_ids)
        theirs = self._choices[layer_idx][kept]
        same = (own[:, :, None] == theirs[:, None, :]).any(dim=-1)  # (tokens, slots)
        self.differing += int((~same).sum())
        self.slots += same.numel()


def joined(rows: Sequence[Choices], length: int) -> dict[int, Tensor]:
    """Put the choices of answers together, each `(its tokens, slots)`, as `(rows * length, slots)`.

    What fills a row up, and counts nowhere, visits the first experts.
    """
    filled: dict[int, Tensor] = {}
    for layer in rows[0]:
        slots = max(row[layer].shape[1] for row in rows)
        chosen = torch.arange(slots).repeat(len(rows), length, 1)
        for row, choices in enumerate(rows):
            own = choices[layer]
            chosen[row, : len(own)] = F.pad(own, (0, slots - own.shape[1]), value=UNUSED)
        filled[layer] = chosen.flatten(0, 1)
    return filled
