"""The output head and its loss in one pass, without ever holding all logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.kernels.fusion import fused

CHUNK = 512
"""Tokens at a time: their logits stay in the last-level cache for usual vocabularies."""


def linear_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy; arguments as in `reference.linear_cross_entropy`.

    Gradients are computed together with the loss, chunk by chunk, when they are wanted.
    """
    wanted = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(  # pyright: ignore[reportReturnType]
        hidden_states, weight, targets, wanted
    )


@fused
def _softmax(logits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`scale` times the softmax of `(tokens, vocab)`, in its type, and the log of its sums."""
    largest = logits.amax(dim=-1, keepdim=True).float()
    exponentials = (logits.float() - largest).exp()
    sums = exponentials.sum(dim=-1, keepdim=True)
    probabilities = exponentials * (scale / sums)
    return probabilities.to(logits.dtype), largest + sums.log()  # (tokens, vocab), (tokens, 1)


def _loss_and_gradient(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of `(tokens, vocab)` logits, and its gradient times `scale`.

    The targets' entries are set outside the fused pass: a scatter inside it would keep the
    compiler from using vector instructions, which made it ten times slower. They are set by
    `index_put_`: PyTorch's `scatter_` copies all of what it writes to, twice.
    """
    gradient, log_sums = _softmax(logits, scale)
    entries = torch.arange(len(targets), device=targets.device), targets
    chosen = logits[entries].float() - log_sums[:, 0]  # (tokens,) log-probabilities
    gradient.index_put_(entries, (chosen.expm1() * scale).to(gradient.dtype))
    return -chosen.sum(), gradient


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor, wanted: bool
    ) -> Tensor:
        tokens = len(targets)
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        grad_hidden = torch.empty_like(hidden_states) if wanted else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        for start in range(0, tokens, CHUNK):
            chunk = hidden_states[start : start + CHUNK]
            target = targets[start : start + CHUNK]
            logits = chunk @ weight.mT  # (chunk, vocab)
            if grad_hidden is None or grad_weight is None:
                total += F.cross_entropy(logits.float(), target, reduction="sum")
                continue
            loss, grad_logits = _loss_and_gradient(logits, target, 1 / tokens)
            total += loss
            torch.mm(grad_logits, weight, out=grad_hidden[start : start + CHUNK])
            grad_weight += grad_logits.mT @ chunk
        ctx.save_for_backward(
            grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        )
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        return grad_hidden * scale, grad_weight * scale, None, None
