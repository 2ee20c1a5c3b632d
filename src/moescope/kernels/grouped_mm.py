"""Routed experts on a GPU: torch's grouped products over rows sorted by expert.

Where each expert's rows end is told on the device, and there are as many rows as slots, so in bf16
nothing waits for the host. Autograd's own backward pass is grouped likewise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.kernels.activation import Activation

ALIGNED_BYTES = 16


def grouped_experts(
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
    """Sum of the chosen experts' outputs, weighted; arguments as in `visited.visited_experts`."""
    experts, slots = len(gate_up_proj), topk_ids.shape[1]
    flat_ids = topk_ids.flatten()
    flat_ids = torch.where(flat_ids < 0, experts, flat_ids)  # unused slots come last
    sorted_ids, order = flat_ids.sort(stable=True)  # (rows,), one row a slot
    numbers = torch.arange(experts, device=sorted_ids.device)
    ends = torch.searchsorted(sorted_ids, numbers, right=True).to(torch.int32)  # (experts,)
    token_idx = order // slots
    unused = (sorted_ids == experts)[:, None]  # products leave whatever was in these rows
    expert_of_row = sorted_ids.clamp(max=experts - 1)

    dispatched = hidden_states.index_select(0, token_idx)  # (rows, hidden)
    gate_up = _grouped(dispatched, gate_up_proj, ends, unused)  # (rows, 2 * intermediate)
    if gate_up_proj_bias is not None:
        gate_up = gate_up + gate_up_proj_bias.index_select(0, expert_of_row)
    activated = activation(*gate_up.chunk(2, dim=-1))  # (rows, intermediate)
    outputs = _grouped(activated, down_proj, ends, unused)  # (rows, hidden)
    if down_proj_bias is not None:
        outputs = outputs + down_proj_bias.index_select(0, expert_of_row)
    weights = topk_weights.flatten().index_select(0, order)[:, None].masked_fill(unused, 0)
    weighted = (outputs * weights).to(hidden_states.dtype)
    return torch.zeros_like(hidden_states).index_add(0, token_idx, weighted)


def _grouped(rows: Tensor, matrices: Tensor, ends: Tensor, unused: Tensor) -> Tensor:
    """`rows[block] @ matrices[expert].T` for each expert's block; zeros in rows of none.

    What flows back into such rows is no gradient either. The products ask for rows of whole 16
    bytes; other widths, which no published model has, are filled up with zeros.
    """
    width, step = matrices.shape[1], ALIGNED_BYTES // rows.itemsize
    inner, outer = -rows.shape[1] % step, -width % step
    rows = torch.where(unused, 0, rows)
    if inner or outer:
        rows, matrices = F.pad(rows, (0, inner)), F.pad(matrices, (0, inner, 0, outer))
    outputs = F.grouped_mm(rows, matrices.mT, offs=ends)[:, :width]
    return torch.where(unused, 0, outputs)
