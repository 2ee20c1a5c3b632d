"""Expert parallelism: tokens travel to the ranks that hold their experts, and sums travel back.

A token is sent once to each rank that holds an expert of its choice, however many it holds, with
the ids and weights of those; the rank adds up what they return, and one row comes back. So a router
that limits the groups a token visits limits what is sent (DeepSeek-V2, 2.2.2; V3, 2.1.2).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moescope.model.routing import UNUSED
from moescope.training.parallel.ranks import Ranks


@dataclass
class Traffic:
    """What the mixtures of a rank sent in a step.

    Attributes:
        tokens: that were routed.
        visits: of a token to a rank.
        crossings: visits to another rank than the token's own.
        node_visits: of a token to a node, which may have several ranks.
        node_crossings: visits to a rank of another node than the token's own.
        bytes: sent to other ranks, forward and backward.
        network_bytes: of them, those sent to other nodes.
    """

    tokens: int = 0
    visits: int = 0
    crossings: int = 0
    node_visits: int = 0
    node_crossings: int = 0
    bytes: int = 0
    network_bytes: int = 0

    def begin(self) -> None:
        """Forget what was sent before the step, as for an evaluation."""
        for name in asdict(self):
            setattr(self, name, 0)

    def over(self, ranks: Ranks) -> dict[str, float]:
        """Return what is logged of all ranks."""
        summed = ranks.sums({name: float(value) for name, value in asdict(self).items()})
        tokens, visits = max(summed["tokens"], 1), max(summed["visits"], 1)
        return {
            "ranks_per_token": summed["visits"] / tokens,
            "nodes_per_token": summed["node_visits"] / tokens,
            "crossing_share": summed["crossings"] / visits,
            "node_crossing_share": summed["node_crossings"] / visits,
            "crossings": summed["crossings"],
            "bytes": summed["bytes"],
            "network_bytes": summed["network_bytes"],
        }


@dataclass(frozen=True)
class Way:
    """Between a rank and the others: how many rows go to each, and how many come from each.

    `nodes` says on which node each of them is.
    """

    sent: list[int]
    received: list[int]
    nodes: Sequence[int]
    group: dist.ProcessGroup
    traffic: Traffic

    @property
    def back(self) -> "Way":
        return replace(self, sent=self.received, received=self.sent)

    @property
    def sent_elsewhere(self) -> int:
        """Rows that go to other ranks."""
        return sum(self.sent) - self.sent[dist.get_rank(self.group)]

    @property
    def sent_to_other_nodes(self) -> int:
        """Rows that go to ranks of other nodes."""
        own = self.nodes[dist.get_rank(self.group)]
        return sum(rows for rows, node in zip(self.sent, self.nodes, strict=True) if node != own)

    def carry(self, rows: Tensor) -> Tensor:
        """Send `(sum of sent, ...)`, in order of ranks; return what came, in order of ranks."""
        arrived = rows.new_empty(sum(self.received), *rows.shape[1:])
        out, to = rows.contiguous(), self.group
        dist.all_to_all_single(arrived, out, self.received, self.sent, group=to)
        self.traffic.bytes += self.sent_elsewhere * rows[:1].nbytes
        self.traffic.network_bytes += self.sent_to_other_nodes * rows[:1].nbytes
        return arrived


@dataclass(frozen=True)
class Arrived:
    """Tokens at the rank that holds their experts, and the way that they came.

    Attributes:
        hidden_states: `(rows, hidden)`.
        topk_ids: `(rows, slots)` int64, counted among this rank's experts.
        topk_weights: `(rows, slots)`.
        token_idx: `(visits,)`, which token of this rank each sent row was.
        tokens: of this rank.
        way: that they came.
    """

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    token_idx: Tensor
    tokens: int
    way: Way


class ExpertParallel:
    """The dispatcher of a mixture whose experts lie on several ranks, as many on each.

    Args:
        mesh: of one dimension, the ranks that share the experts.
        experts: of all of them.
        traffic: counts what is sent.
        ranks_per_node: neighbours of all ranks that are on one node.
    """

    def __init__(
        self, mesh: DeviceMesh, experts: int, traffic: Traffic, ranks_per_node: int
    ) -> None:
        self._group, self._rank, self._ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self._experts_per_rank = experts // mesh.size()
        self._traffic = traffic
        numbers = dist.get_process_group_ranks(self._group)
        self._nodes = [number // ranks_per_node for number in numbers]

    def held(self, parameter: Tensor) -> Tensor:
        """Return the part of a parameter that belongs to this rank's experts."""
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def dispatch(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Arrived:
        """Send `(tokens, hidden)` to the ranks of the experts in `(tokens, slots)`."""
        tokens, slots = topk_ids.shape
        rank_of_slot = topk_ids.div(self._experts_per_rank, rounding_mode="floor")  # UNUSED stays
        visits = torch.zeros(tokens, self._ranks + 1, dtype=torch.bool, device=topk_ids.device)
        visits = visits.scatter_(1, rank_of_slot + 1, True)[:, 1:]  # (tokens, ranks)
        destination, token_idx = visits.mT.nonzero(as_tuple=True)  # (visits,) each, by rank
        way, most_slots = self._announce(visits.sum(dim=0), slots)
        self._traffic.tokens += tokens
        self._traffic.visits += len(token_idx)
        self._traffic.crossings += way.sent_elsewhere
        self._traffic.node_visits += self._node_visits(visits)
        self._traffic.node_crossings += way.sent_to_other_nodes

        destination = destination[:, None]
        there = rank_of_slot[token_idx] == destination  # (visits, slots)
        ids = topk_ids[token_idx] - destination * self._experts_per_rank
        ids = F.pad(ids.masked_fill(~there, UNUSED), (0, most_slots - slots), value=UNUSED)
        weights = topk_weights[token_idx].masked_fill(~there, 0.0)
        weights = F.pad(weights, (0, most_slots - slots))
        rows = hidden_states.index_select(0, token_idx)  # (visits, hidden)
        rows, weights = _There.apply(rows, weights, way)  # pyright: ignore[reportGeneralTypeIssues]
        ids = way.carry(ids)
        if not len(ids):  # the experts compute all the same, so that they have gradients
            one = (0, 0, 0, 1)
            rows, weights, ids = F.pad(rows, one), F.pad(weights, one), F.pad(ids, one)
        return Arrived(rows, ids, weights, token_idx, tokens, way)

    def combine(self, outputs: Tensor, arrived: Arrived) -> Tensor:
        """Send `(rows, hidden)` back and add up each token's, to `(tokens, hidden)`."""
        outputs = outputs[: sum(arrived.way.received)]
        returned: Tensor = _Back.apply(outputs, arrived.way)  # pyright: ignore[reportAssignmentType]
        summed = returned.new_zeros(arrived.tokens, returned.shape[1])
        return summed.index_add(0, arrived.token_idx, returned)

    def _announce(self, counts: Tensor, slots: int) -> tuple[Way, int]:
        """Tell all ranks how many rows come; return the way, and the most slots of a rank."""
        own = F.pad(counts, (0, 1), value=slots)  # (ranks + 1,)
        everyone = own.new_empty(self._ranks * (self._ranks + 1))
        dist.all_gather_single(everyone, own, group=self._group)
        told: list[list[int]] = everyone.view(self._ranks, -1).tolist()
        received = [row[self._rank] for row in told]
        way = Way(told[self._rank][:-1], received, self._nodes, self._group, self._traffic)
        return way, max(row[-1] for row in told)

    def _node_visits(self, visits: Tensor) -> int:
        """Count the nodes that tokens visit, of `(tokens, ranks)` that says which ranks."""
        if len(set(self._nodes)) == 1:
            return len(visits)
        by_node = [
            visits[:, [place == node for place in self._nodes]].any(dim=1)
            for node in sorted(set(self._nodes))
        ]
        return int(torch.stack(by_node).sum())


class _There(torch.autograd.Function):
    """Tokens and their weights to the experts; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, way: Way) -> tuple[Tensor, Tensor]:
        ctx.way = way
        return way.carry(rows), way.carry(weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_weights = grad_outputs
        back: Way = ctx.way.back
        learned = ctx.needs_input_grad[1]
        return back.carry(grad_rows), back.carry(grad_weights) if learned else None, None


class _Back(torch.autograd.Function):
    """The experts' sums to the tokens' ranks; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return way.back.carry(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.way.carry(grad_outputs[0]), None
