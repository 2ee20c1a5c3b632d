"""Routers, which are data to the kernels, and what they chose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moescope.kernels.cpu import extension
from moescope.kernels.cpu.tensors import as_rows, memory_of, memory_or_none

if TYPE_CHECKING:
    from moescope.kernels._native import Decoder, Router


def router(
    weight: Tensor,
    *,
    top_k: int,
    logit_bias: Tensor | None = None,
    bias: Tensor | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    best_of_group: int = 1,
    scoring: str,
    normalise: bool,
    factor: float,
    disabled: Iterable[int] = (),
    forced: Iterable[int] = (),
    table: Tensor | None = None,
) -> Router:
    """Make a router: scores, then the `top_k` best of the `kept_groups` best groups.

    Args:
        weight: `(experts, hidden)` float32, contiguous; it is not copied.
        top_k: experts of a token.
        logit_bias: `(experts,)`, of the linear map.
        bias: `(experts,)`, added to the scores for the choice only.
        groups: equal groups of neighbouring experts.
        kept_groups: groups that a token may use.
        best_of_group: how many of its best scores, summed, rank a group.
        scoring: `softmax`, `sigmoid` or `sqrtsoftplus` of the logits; or `relu`, where logits
            above zero alone are chosen.
        normalise: whether a token's weights are made to sum to one.
        factor: of the weights.
        disabled: experts that are as if they did not exist.
        forced: experts that every token visits, of whatever group.
        table: `(vocab, top_k)` int64, the experts of each token id, in place of the best.
    """
    return extension.native.router(
        memory_of(weight.detach()),
        memory_or_none(logit_bias),
        memory_or_none(bias),
        top_k,
        groups,
        kept_groups,
        best_of_group,
        scoring,
        normalise,
        factor,
        list(disabled),
        list(forced),
        memory_or_none(table),
    )


def route(
    rule: Router, hidden_states: Tensor, top_k: int, input_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `topk_ids` and `topk_weights`, `(tokens, top_k)`, for `(tokens, hidden)`.

    A slot for which no expert is left has id -1 and weight 0. `input_ids` `(tokens,)` matter to a
    router with a table only.
    """
    topk_ids = torch.empty(len(hidden_states), top_k, dtype=torch.int64)
    topk_weights = torch.empty(len(hidden_states), top_k)
    ids = memory_or_none(input_ids)
    rule(memory_of(as_rows(hidden_states)), ids, memory_of(topk_ids), memory_of(topk_weights))
    return topk_ids, topk_weights


@dataclass(frozen=True)
class Chosen:
    """What routers chose, `(layers with routers, tokens, slots)` each.

    Attributes:
        ids: of experts, int64; -1 in a slot that no expert is left for.
        weights: float32; None if nobody asks.
        scores: before they became weights, likewise.
    """

    ids: Tensor
    weights: Tensor | None
    scores: Tensor | None


@dataclass(frozen=True)
class RowRouters:
    """Other routers than a decoder's own for some rows.

    Attributes:
        sets: routers of all layers, None where one has no routed experts.
        set_of_row: for each row the place of its routers in `sets`, or -1.
    """

    sets: list[list[Router | None]]
    set_of_row: list[int]


def choices(
    layers: Decoder, depth: int, tokens: int, others: RowRouters | None, *, ids_alone: bool = False
) -> Chosen:
    """Room for what `depth` routers of a decoder choose for so many tokens."""
    shape = depth, tokens, layers.most_slots([] if others is None else others.sets)
    ids = torch.empty(shape, dtype=torch.int64)
    if ids_alone:
        return Chosen(ids, None, None)
    return Chosen(ids, torch.empty(shape), torch.empty(shape))
