"""Plain PyTorch, one operation at a time: the truth that the other kernels are tested against."""

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
    """Sum of the chosen experts' outputs, weighted (DeepSeekMoE, eq. 3).

    Args:
        hidden_states: `(tokens, hidden)`.
        gate_up_proj: `(experts, 2 * intermediate, hidden)`, gate rows before up rows.
        down_proj: `(experts, hidden, intermediate)`.
        topk_ids: `(tokens, slots)` int64; negative marks an unused slot.
        topk_weights: `(tokens, slots)`.

    Returns:
        `(tokens, hidden)` in the type of `hidden_states`.
    """
    output = torch.zeros_like(hidden_states)
    for expert in range(gate_up_proj.shape[0]):
        token_idx, slot = torch.where(topk_ids == expert)
        gate, up = F.linear(hidden_states[token_idx], gate_up_proj[expert]).chunk(2, dim=-1)
        expert_output = F.linear(swiglu(gate, up), down_proj[expert])
        weighted = expert_output * topk_weights[token_idx, slot, None]
        output = output.index_add(0, token_idx, weighted.to(output.dtype))
    return output


def linear_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of `hidden_states @ weight.T` against `targets`, in nats.

    Args:
        hidden_states: `(tokens, hidden)`.
        weight: `(vocab, hidden)`.
        targets: `(tokens,)` int64.
    """
    return F.cross_entropy(F.linear(hidden_states, weight).float(), targets)
