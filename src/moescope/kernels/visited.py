"""Routed experts one after another, where biases or another activation rule out `grouped`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.kernels.activation import Activation


def visited_experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: Activation,
    gate_up_proj_bias: Tensor | None = None,
    down_proj_bias: Tensor | None = None,
) -> Tensor:
    """Sum of the chosen experts' outputs, weighted; only experts that a token visits compute.

    Args:
        hidden_states: `(tokens, hidden)`.
        gate_up_proj: `(experts, 2 * intermediate, hidden)`, gate rows before up rows.
        down_proj: `(experts, hidden, intermediate)`.
        topk_ids: `(tokens, slots)` int64; negative marks an unused slot.
        topk_weights: `(tokens, slots)`.
        activation: joins gate and up.
        gate_up_proj_bias: `(experts, 2 * intermediate)`.
        down_proj_bias: `(experts, hidden)`.

    Returns:
        `(tokens, hidden)` in the type of `hidden_states`.
    """
    output = torch.zeros_like(hidden_states)
    for expert in topk_ids[topk_ids >= 0].unique().tolist():
        token_idx, slot = torch.where(topk_ids == expert)
        first, second = (
            None if bias is None else bias[expert] for bias in (gate_up_proj_bias, down_proj_bias)
        )
        gate, up = F.linear(hidden_states[token_idx], gate_up_proj[expert], first).chunk(2, dim=-1)
        expert_output = F.linear(activation(gate, up), down_proj[expert], second)
        weighted = expert_output * topk_weights[token_idx, slot, None]
        output = output.index_add(0, token_idx, weighted.to(output.dtype))
    return output
