"""Causal attention in blocks of matrix products, for training with a hand-written backward pass.

PyTorch's fused attention keeps memory small but runs its products far below the machine's rate
in bf16 on a CPU; at training lengths the probabilities fit in memory and plain batched products
are three times as fast. Each block of queries meets only the keys it may see.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 128
"""Queries at a time."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Softmax of `scale * query @ key.T` over the keys up to each query, times `value`.

    Args:
        query: `(batch, heads, seq, width)`.
        key: `(batch, heads, seq, width)`.
        value: `(batch, heads, seq, value width)`.
        scale: factor of the attention logits.

    Returns:
        `(batch, heads, seq, value width)`.
    """
    batch_shape = query.shape[:2]
    output = _CausalAttention.apply(
        (query * scale).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    )
    return output.unflatten(0, batch_shape)  # pyright: ignore


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads, seq, _ = query.shape
        output = query.new_empty(heads, seq, value.shape[-1])
        future = query.new_full((BLOCK, BLOCK), -torch.inf).triu(1)
        blocks: list[Tensor] = []
        for start in range(0, seq, BLOCK):
            end = min(start + BLOCK, seq)
            logits = torch.bmm(query[:, start:end], key[:, :end].mT)  # (heads, block, end)
            logits[:, :, start:] += future[: end - start, : end - start]
            probabilities = logits.softmax(dim=-1)
            output[:, start:end] = torch.bmm(probabilities, value[:, :end])
            blocks.append(probabilities)
        ctx.save_for_backward(query, key, value, output, *blocks)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, output, *blocks = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        inner = (grad * output).sum(dim=-1, keepdim=True)  # (heads, seq, 1)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for index, probabilities in enumerate(blocks):
            start = index * BLOCK
            end = start + probabilities.shape[1]
            block_grad = grad[:, start:end]
            grad_value[:, :end] += torch.bmm(probabilities.mT, block_grad)
            grad_logits = torch.bmm(block_grad, value[:, :end].mT)
            grad_logits.sub_(inner[:, start:end]).mul_(probabilities)
            grad_query[:, start:end] = torch.bmm(grad_logits, key[:, :end])
            grad_key[:, :end] += torch.bmm(grad_logits.mT, query[:, start:end])
        return grad_query, grad_key, grad_value
