"""Routed experts as grouped matrix products: dispatch, experts, combine, each with its backward.

Tokens are sorted by expert once, so that each expert multiplies one contiguous block; no token
is dropped. Blocks are padded to a few row counts, because a matrix product of a new size costs
oneDNN a compilation that is dearer than the product itself. The routing weight is applied
before the down projection, where rows are narrow: padding rows weigh nothing, and the weight's
gradient needs no second copy of the experts' outputs.
"""

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.kernels.fusion import fused


@fused
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise (Shazeer 2020, eq. 6)."""
    return F.silu(gate) * up


def routed_experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
) -> Tensor:
    """Sum of the chosen experts' outputs, weighted; arguments as in `reference.routed_experts`."""
    there = dispatch(topk_ids, gate_up_proj.shape[0])
    dispatched, weights = _Dispatch.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden_states, topk_weights, there.token_idx, there.row_of_slot
    )
    outputs = _Experts.apply(dispatched, weights, gate_up_proj, down_proj, there.edges)
    return _Combine.apply(  # pyright: ignore[reportReturnType]
        outputs, there.token_idx, there.row_of_slot
    )


class Dispatch(NamedTuple):
    """Where each token goes: rows sorted by expert, then one spare row."""

    token_idx: Tensor  # (rows,) the token in each row; any token in a padding row
    row_of_slot: Tensor  # (tokens, slots) the row of each slot; the spare row if it is unused
    edges: list[int]  # rows of expert e are edges[e] to edges[e + 1]


def dispatch(topk_ids: Tensor, experts: int) -> Dispatch:
    """Sort the slots of `topk_ids` `(tokens, slots)` by expert into padded blocks of rows."""
    tokens, slots = topk_ids.shape
    device = topk_ids.device
    flat_ids = topk_ids.flatten() + 1  # unused slots are block 0
    order = flat_ids.argsort(stable=True)
    counts = torch.bincount(flat_ids, minlength=experts + 1)  # (1 + experts,)
    block = _block_rows(tokens * slots // experts)
    padded = (counts + block - 1) // block * block
    padded[0] = 0
    edges = F.pad(padded[1:].cumsum(0), (1, 0))  # (experts + 1,)
    starts = torch.cat([edges[:1], edges[:-1]]) - (counts.cumsum(0) - counts)
    bounds: list[int] = edges.tolist()
    spare = bounds[-1]
    sorted_ids = flat_ids[order]
    rows = torch.arange(tokens * slots, device=device) + starts[sorted_ids]
    rows = torch.where(sorted_ids == 0, spare, rows)
    token_idx = torch.zeros(spare + 1, dtype=torch.int64, device=device)
    token_idx[rows] = order // slots
    row_of_slot = torch.empty_like(order)
    row_of_slot[order] = rows
    return Dispatch(token_idx, row_of_slot.view(tokens, slots), bounds)


def _block_rows(rows_per_expert: int) -> int:
    """A power of two of at most an eighth of an expert's usual rows, and of at most 64."""
    return 1 << min(6, max(0, rows_per_expert.bit_length() - 4))


@fused
def _activate(gate_up: Tensor, weights: Tensor) -> Tensor:
    """SwiGLU of `(rows, 2 * intermediate)`, times the routing weight of the row, `(rows, 1)`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * weights


@fused
def _activate_backward(
    gate_up: Tensor, weights: Tensor, grad_weighted: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `_activate`'s result again, and the gradients of weights, gate and up."""
    gate, up = gate_up.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    activated = silu * up
    grad_weights = (grad_weighted * activated).sum(dim=-1, dtype=torch.float32)
    grad_activated = grad_weighted * weights
    grad_gate = grad_activated * up * (sigmoid + silu * (1 - sigmoid))
    return activated * weights, grad_weights, grad_gate, grad_activated * silu


class _Dispatch(torch.autograd.Function):
    """Copy each token, and what it weighs with an expert, into the expert's block of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        topk_weights: Tensor,
        token_idx: Tensor,
        row_of_slot: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights = topk_weights.new_zeros(len(token_idx), dtype=torch.float32)
        weights[row_of_slot.flatten()] = topk_weights.flatten().to(weights.dtype)
        weights[-1] = 0
        ctx.weights_dtype = topk_weights.dtype
        ctx.save_for_backward(row_of_slot)
        return hidden_states.index_select(0, token_idx), weights  # (rows, hidden), (rows,)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (row_of_slot,) = ctx.saved_tensors
        grad_dispatched, grad_weights = grad_outputs
        grad_topk_weights = grad_weights[row_of_slot].to(ctx.weights_dtype)
        return _sum_slots(grad_dispatched, row_of_slot), grad_topk_weights, None, None


class _Experts(torch.autograd.Function):
    """Let each expert map its block of rows, weighted: `(rows, hidden)` to the same shape."""

    @staticmethod
    def forward(
        ctx: Any,
        dispatched: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        edges: list[int],
    ) -> Tensor:
        weights = weights[:, None].to(dispatched.dtype)  # (rows, 1)
        gate_up = dispatched.new_empty(len(dispatched), gate_up_proj.shape[1])
        gate_up[-1] = 0
        _per_expert(edges, dispatched, gate_up_proj.mT, gate_up)
        weighted = _activate(gate_up, weights)  # (rows, intermediate)
        outputs = torch.empty_like(dispatched)
        outputs[-1] = 0
        _per_expert(edges, weighted, down_proj.mT, outputs)
        ctx.edges = edges
        ctx.save_for_backward(dispatched, gate_up, weights, gate_up_proj, down_proj)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dispatched, gate_up, weights, gate_up_proj, down_proj = ctx.saved_tensors
        edges: list[int] = ctx.edges
        grad = grad_outputs[0]  # (rows, hidden)
        grad_weighted = torch.empty_like(gate_up[:, : gate_up.shape[1] // 2])
        grad_weighted[-1] = 0
        _per_expert(edges, grad, down_proj, grad_weighted)
        weighted, grad_weights, grad_gate, grad_up = _activate_backward(
            gate_up, weights, grad_weighted
        )
        grad_down = torch.zeros_like(down_proj)
        _outer_per_expert(edges, grad, weighted, grad_down)
        grad_gate_up = torch.cat([grad_gate, grad_up], dim=-1)
        grad_gate_up_proj = torch.zeros_like(gate_up_proj)
        _outer_per_expert(edges, grad_gate_up, dispatched, grad_gate_up_proj)

        grad_dispatched = torch.empty_like(dispatched)
        grad_dispatched[-1] = 0
        _per_expert(edges, grad_gate_up, gate_up_proj, grad_dispatched)
        return grad_dispatched, grad_weights, grad_gate_up_proj, grad_down, None


class _Combine(torch.autograd.Function):
    """Sum each token's rows: `(rows, hidden)` to `(tokens, hidden)`."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, token_idx: Tensor, row_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(token_idx)
        return _sum_slots(outputs, row_of_slot)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (token_idx,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, token_idx), None, None


def _per_expert(edges: list[int], rows: Tensor, matrices: Tensor, out: Tensor) -> None:
    """`out[block] = rows[block] @ matrices[expert]` for each expert's block of rows."""
    for expert, (start, end) in enumerate(itertools.pairwise(edges)):
        if start < end:
            torch.mm(rows[start:end], matrices[expert], out=out[start:end])


def _outer_per_expert(edges: list[int], left: Tensor, right: Tensor, out: Tensor) -> None:
    """`out[expert] = left[block].T @ right[block]` for each expert's block of rows."""
    for expert, (start, end) in enumerate(itertools.pairwise(edges)):
        if start < end:
            torch.mm(left[start:end].mT, right[start:end], out=out[expert])


def _sum_slots(rows: Tensor, row_of_slot: Tensor) -> Tensor:
    """Sum each token's rows: `(rows, width)` by `(tokens, slots)` to `(tokens, width)`."""
    return F.embedding_bag(row_of_slot, rows, mode="sum")
