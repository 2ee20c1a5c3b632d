"""Products with packed weights, and whole feed-forward layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moescope.kernels.cpu import extension
from moescope.kernels.cpu.tensors import as_rows, memory_of, memory_or_none

if TYPE_CHECKING:
    from moescope.kernels._native import FeedForward, Weights


def rows(weights: Weights, ids: Tensor, width: int) -> Tensor:
    """Take rows `ids` `(...)` int64 out of one packed matrix: `(..., width)` float32.

    Raises:
        ValueError: there is no such row.
    """
    flat = ids.flatten().contiguous()
    out = torch.empty(len(flat), width)
    weights.rows(memory_of(flat), memory_of(out))
    return out.view(*ids.shape, width)


def linear(weights: Weights, outputs: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map `(..., columns)` to `(..., outputs)` float32; several matrices' outputs lie in a row."""
    x = x.float().contiguous()
    out = torch.empty(*x.shape[:-1], outputs)
    weights.linear(memory_of(x), None if bias is None else memory_of(bias), memory_of(out))
    return out


def feed_forward_layer(
    routed: tuple[Weights, Weights, Weights] | None,
    shared: tuple[Weights, Weights, Weights] | None,
    *,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    act: str = "silu",
    limit: float | None = None,
    shared_limit: float | None = None,
) -> FeedForward:
    """Join routed experts and shared ones, or either alone, into one call.

    Args:
        routed: packed gate, up and down matrices of the experts that tokens choose.
        shared: those of the expert that every token visits.
        biases: of the routed experts' gate, up `(experts, intermediate)` and down
            `(experts, hidden)`.
        act: of the routed experts: `silu` for `silu(gate) * up`, `swigluoai` for gpt-oss's
            `(up + 1) * gate * sigmoid(1.702 * gate)`.
        limit: bounds the routed experts' gate from above and up from both sides before they meet.
        shared_limit: likewise of the shared expert.
    """
    nothing = (None, None, None)
    gate_bias, up_bias, down_bias = biases or nothing
    return extension.native.FeedForward(
        *(routed or nothing),
        *(shared or nothing),
        memory_or_none(gate_bias),
        memory_or_none(up_bias),
        memory_or_none(down_bias),
        act == "swigluoai",
        limit,
        shared_limit,
    )


def feed_forward(
    layer: FeedForward,
    hidden_states: Tensor,
    topk_ids: Tensor | None = None,
    topk_weights: Tensor | None = None,
) -> Tensor:
    """Sum of the chosen experts' outputs, weighted, and the shared experts' (DeepSeekMoE, eq. 9).

    Args:
        layer: made by `feed_forward_layer`.
        hidden_states: `(..., hidden)`.
        topk_ids: `(tokens, slots)` int64; negative marks an unused slot.
        topk_weights: `(tokens, slots)` float32.
    """
    rows = as_rows(hidden_states)  # (tokens, hidden)
    out = torch.empty_like(rows)
    if topk_ids is None or topk_weights is None:
        layer(memory_of(rows), None, None, memory_of(out))
    else:
        ids, weights = topk_ids.contiguous(), topk_weights.float().contiguous()
        layer(memory_of(rows), memory_of(ids), memory_of(weights), memory_of(out))
    return out.view(hidden_states.shape)


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `kernels.rms_norm`, in float32 for `(..., width)`."""
    x = hidden_states.float().contiguous()
    out = torch.empty_like(x)
    extension.native.rms_norm(memory_of(x), memory_of(weight), eps, memory_of(out))
    return out
