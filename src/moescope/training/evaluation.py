"""Held-out loss and expert load, per domain."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moescope import kernels
from moescope.model.balancing import dead_share, load_entropy, max_violation
from moescope.model.decoder import CausalLM
from moescope.training.batches import HeldOutBatches
from moescope.training.data import ShardIndex
from moescope.training.objective import LoadRecorder
from moescope.training.parallel.ranks import Ranks
from moescope.training.part import Part


@dataclass(frozen=True)
class Evaluation:
    """What held-out text showed.

    Attributes:
        loss: domain -> mean nats a token.
        bits_per_byte: domain -> bits that a byte of text costs.
        load: domain -> layer index -> tokens that each expert received.
    """

    loss: dict[str, float]
    bits_per_byte: dict[str, float]
    load: dict[str, dict[int, list[int]]]

    def router_measures(self) -> dict[int, dict[str, float]]:
        """MaxVio, entropy and share of dead experts for each layer, over all domains."""
        measures: dict[int, dict[str, float]] = {}
        layers = next(iter(self.load.values()), {})
        for layer in layers:
            counts = torch.tensor([by_layer[layer] for by_layer in self.load.values()]).sum(dim=0)
            measures[layer] = {
                "max_violation": float(max_violation(counts)),
                "entropy": float(load_entropy(counts)),
                "dead_share": float(dead_share(counts)),
            }
        return measures

    def to_row(self) -> dict[str, Any]:
        return {
            "held_out_loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "router": self.router_measures(),
        }


@torch.no_grad()
def evaluate(
    model: CausalLM,
    index: ShardIndex,
    *,
    batch_size: int,
    sequence_length: int,
    max_tokens: int,
    ranks: Ranks,
) -> Evaluation:
    """Run up to `max_tokens` held-out tokens of every domain through the network."""
    loss: dict[str, float] = {}
    bits_per_byte: dict[str, float] = {}
    load: dict[str, dict[int, list[int]]] = {}
    device = model.lm_head.weight.device
    model.eval()
    for domain in index.domains:
        batches = HeldOutBatches(index, domain, batch_size, sequence_length, max_tokens)
        counts: dict[int, Tensor] = {}
        total = 0.0
        for ids in batches:
            part = Part(ids=ids.to(device), share=1.0).own(ranks)
            recorder = LoadRecorder(part.read)
            hidden_states = model(part.ids[:, :-1], recorder=recorder).flatten(0, 1)
            weight, targets = model.lm_head.weight, part.ids[:, 1:].flatten()
            mean = float(kernels.linear_cross_entropy(hidden_states, weight, targets))
            total += mean * part.tokens
            for layer, received in recorder.counts.items():
                counts[layer] = counts.get(layer, 0) + received
        total = ranks.sums({"loss": total})["loss"]
        loss[domain] = total / batches.n_tokens
        bits_per_byte[domain] = total / math.log(2) / max(batches.n_bytes, 1)
        load[domain] = {layer: ranks.sum(counts[layer]).tolist() for layer in counts}
    model.train()
    return Evaluation(loss, bits_per_byte, load)
