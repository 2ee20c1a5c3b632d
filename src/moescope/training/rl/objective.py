"""What reinforcement minimises: GRPO, and the normalisations of Dr.GRPO and GSPO."""

from typing import Literal

import torch
from torch import Tensor

Normalisation = Literal["grpo", "dr_grpo", "gspo"]
EPS = 1e-6


def group_advantages(rewards: Tensor, normalisation: Normalisation) -> Tensor:
    """Hold answers against others to the same problem: `(groups, group_size)`, and so returned.

    GRPO and GSPO divide by the group's (population) standard deviation (DeepSeekMath, 4.1.2:
    `(r - mean(r)) / std(r)`); Dr.GRPO does not, as that favours problems that nearly all or
    nearly no answers solve (Liu et al. 2025, section 3).
    """
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    if normalisation == "dr_grpo":
        return centred
    return centred / (rewards.std(dim=-1, correction=0, keepdim=True) + EPS)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    made: Tensor,
    *,
    normalisation: Normalisation,
    clip_low: float,
    clip_high: float,
    max_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Sum the answers' losses, to be divided by their number.

    With `rho` the ratio of probabilities now and when the answer was drawn, a token is worth
    `min(rho * A, clip(rho) * A)` (DeepSeekMath, eq. 3). `grpo` takes the mean over each answer's
    tokens; `dr_grpo` the sum over `max_tokens`, so that a long wrong answer is not let off; `gspo`
    one ratio an answer, the geometric mean of its tokens' (Zheng et al. 2025, eq. 5-7).

    Args:
        logprobs: `(rows, seq)` of the tokens under the network in training.
        old_logprobs: `(rows, seq)` under the one that drew them.
        advantages: `(rows,)`.
        made: `(rows, seq)` bool, which tokens belong to the answer.
        normalisation: see above.
        clip_low: by how much a ratio may fall below one.
        clip_high: by how much it may rise above one.
        max_tokens: that an answer may have; `dr_grpo` divides by it.

    Returns:
        The loss, and the share of ratios that the clip held back, both zero-dimensional.
    """
    lengths = made.sum(dim=-1).clamp(min=1)  # (rows,)
    differences = (logprobs - old_logprobs).masked_fill(~made, 0.0)
    advantages = advantages[:, None]
    counted = made
    if normalisation == "gspo":
        differences = differences.sum(dim=-1, keepdim=True) / lengths[:, None]  # (rows, 1)
        counted = made.any(dim=-1, keepdim=True)
    ratios = differences.exp()
    clipped = ratios.clamp(1 - clip_low, 1 + clip_high)
    worth = torch.minimum(ratios * advantages, clipped * advantages)
    held_back = (clipped * advantages < ratios * advantages) & counted
    weights = {
        "grpo": 1 / lengths.to(worth.dtype),
        "dr_grpo": torch.full_like(lengths, 1, dtype=worth.dtype) / max_tokens,
        "gspo": torch.ones_like(lengths, dtype=worth.dtype),
    }[normalisation]
    loss = -(worth * counted * weights[:, None].to(worth.dtype)).sum()
    return loss, held_back.sum() / counted.sum().clamp(min=1)


def divergence(logprobs: Tensor, reference: Tensor, made: Tensor) -> Tensor:
    """Sum each answer's mean divergence from a reference model (DeepSeekMath, eq. 4).

    `exp(r - p) - (r - p) - 1` is never negative and unbiased; arguments are `(rows, seq)`.
    """
    differences = (reference - logprobs).masked_fill(~made, 0.0)
    per_token = differences.exp() - differences - 1
    return (per_token.sum(dim=-1) / made.sum(dim=-1).clamp(min=1)).sum()
