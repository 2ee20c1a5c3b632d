"""Routed experts as grouped matrix products, with a hand-written backward pass.

Tokens are sorted by expert once, so that each expert multiplies one contiguous block; nothing
is dropped and nothing padded. The routing weight is applied before the down projection, where
rows are narrow, so its gradient needs no second copy of the experts' outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
    return _RoutedExperts.apply(  # pyright: ignore[reportReturnType]
        hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights
    )


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
    ) -> Tensor:
        tokens, slots = topk_ids.shape
        experts = gate_up_proj.shape[0]
        flat_ids = topk_ids.flatten()
        order = flat_ids.argsort(stable=True)  # (rows,) slots by expert, unused ones first
        counts = torch.bincount(flat_ids + 1, minlength=experts + 1)
        ends: list[int] = counts.cumsum(0).tolist()
        token_idx = order // slots
        weights = topk_weights.flatten()[order, None].to(hidden_states.dtype)  # (rows, 1)

        dispatched = hidden_states[token_idx]  # (rows, hidden)
        gate_up = hidden_states.new_empty(len(order), gate_up_proj.shape[1])
        _per_expert(ends, dispatched, gate_up_proj.mT, gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        weighted = swiglu(gate, up).mul_(weights)  # (rows, intermediate)
        outputs = torch.empty_like(dispatched)
        outputs[: ends[0]].zero_()
        _per_expert(ends, weighted, down_proj.mT, outputs)

        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        ctx.ends, ctx.slots = ends, slots
        ctx.save_for_backward(
            dispatched, gate_up, weights, gate_up_proj, down_proj, token_idx, inverse
        )
        return outputs[inverse].view(tokens, slots, -1).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dispatched, gate_up, weights, gate_up_proj, down_proj, token_idx, inverse = (
            ctx.saved_tensors
        )
        ends: list[int] = ctx.ends
        grad = grad_outputs[0][token_idx]  # (rows, hidden)
        gate, up = gate_up.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        activated = silu * up  # (rows, intermediate)

        grad_weighted = torch.empty_like(activated)
        _per_expert(ends, grad, down_proj, grad_weighted)
        grad_weights = (grad_weighted * activated).sum(dim=-1, dtype=torch.float32)
        grad_weights[: ends[0]] = 0
        grad_down = torch.zeros_like(down_proj)
        _outer_per_expert(ends, grad, activated.mul_(weights), grad_down)

        grad_activated = grad_weighted.mul_(weights)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad_activated, silu, out=grad_up)
        slope = sigmoid.addcmul_(silu, 1 - sigmoid)
        torch.mul(grad_activated.mul_(up), slope, out=grad_gate)
        grad_gate_up_proj = torch.zeros_like(gate_up_proj)
        _outer_per_expert(ends, grad_gate_up, dispatched, grad_gate_up_proj)

        grad_dispatched = torch.empty_like(dispatched)
        grad_dispatched[: ends[0]].zero_()
        _per_expert(ends, grad_gate_up, gate_up_proj, grad_dispatched)
        slots = ctx.slots
        grad_hidden = grad_dispatched[inverse].view(-1, slots, grad.shape[-1]).sum(dim=1)
        grad_topk_weights = grad_weights[inverse].view(-1, slots)
        return grad_hidden, grad_gate_up_proj, grad_down, None, grad_topk_weights


def _per_expert(ends: list[int], rows: Tensor, matrices: Tensor, out: Tensor) -> None:
    """`out[block] = rows[block] @ matrices[expert]` for each expert's block of rows."""
    for expert, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        if start < end:
            torch.mm(rows[start:end], matrices[expert], out=out[start:end])


def _outer_per_expert(ends: list[int], left: Tensor, right: Tensor, out: Tensor) -> None:
    """`out[expert] = left[block].T @ right[block]` for each expert's block of rows."""
    for expert, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        if start < end:
            torch.mm(left[start:end].mT, right[start:end], out=out[expert])
