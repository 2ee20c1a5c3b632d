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


def latent_prompt_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    scale: float,
    past: int,
) -> Tensor:
    """Attention of a prompt over expanded latents (DeepSeek-V2, eq. 17), without gradients.

    The rotated key is the same for all heads and is never repeated; a block of queries meets only
    the keys it may see, so that no mask is made and memory stays small.

    Args:
        q_nope: `(batch, seq, heads, nope)`, at positions from `past` on.
        q_rope: `(batch, seq, heads, rope)`.
        k_nope: `(batch, slots, heads, nope)`, of which the first `past + seq` slots are used.
        k_rope: `(batch, slots, rope)`.
        value: `(batch, slots, heads, v_head_dim)`.
        scale: factor of the attention logits.
        past: tokens before the first query.

    Returns:
        `(batch, seq, heads, v_head_dim)`.
    """
    batch, seq, heads, _ = q_nope.shape
    output = q_nope.new_empty(batch, seq, heads, value.shape[-1])
    future = q_nope.new_full((BLOCK, BLOCK), -torch.inf).triu(1)
    for row in range(batch):
        # One sequence at a time, heads first and contiguous, as matrix products like it.
        unrotated = (q_nope[row] * scale).transpose(0, 1).contiguous()  # (heads, seq, nope)
        rotated = (q_rope[row] * scale).transpose(0, 1).contiguous()  # (heads, seq, rope)
        keys = k_nope[row].permute(1, 2, 0).contiguous()  # (heads, nope, slots)
        values = value[row].transpose(0, 1).contiguous()  # (heads, slots, v_head_dim)
        for start in range(0, seq, BLOCK):
            end = min(start + BLOCK, seq)
            visible = past + end
            block = rotated[:, start:end].flatten(0, 1)  # (heads * block, rope)
            logits = (block @ k_rope[row, :visible].mT).view(heads, end - start, visible)
            logits.baddbmm_(unrotated[:, start:end], keys[:, :, :visible])
            logits[:, :, past + start :] += future[: end - start, : end - start]
            probabilities = logits.softmax(dim=-1)
            mixed = torch.bmm(probabilities, values[:, :visible])  # (heads, block, v_head_dim)
            output[row, start:end] = mixed.transpose(0, 1)
    return output


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
