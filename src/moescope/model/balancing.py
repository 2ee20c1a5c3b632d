"""Keeping experts busy: auxiliary losses, the loss-free bias, and the measures of success.

Scores are `(tokens, experts)`, choices `(tokens, slots)` with negative ids for unused slots, as
in `routing.Routing`. Losses are scalars without their weight; they are zero-dimensional float32.

Where a loss speaks of an expert's share `P_i`, each token's scores are first made to sum to one, as
softmax scores do anyhow. Else sigmoid scores could please it by all shrinking together, which
evens out nothing.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def chosen_experts(topk_ids: Tensor, experts: int) -> Tensor:
    """One where a token goes to an expert, else zero: `(tokens, experts)` float32."""
    spread = torch.zeros(len(topk_ids), experts + 1, device=topk_ids.device)
    return spread.scatter_(1, topk_ids + 1, 1.0)[:, 1:]


def expert_level_loss(scores: Tensor, topk_ids: Tensor, counts: Tensor | None = None) -> Tensor:
    """`sum_i f_i P_i` over all tokens (DeepSeekMoE, eq. 12-14); one when the load is even.

    `f_i` is expert i's share of the choices times the number of experts; it carries no gradient.
    `P_i` is its mean share of a token's scores. As `P_i` enters linearly, the mean over parts of a
    batch is the loss of the whole if each part is given the load of the whole.

    `counts` is `(experts,)`, the tokens that each expert received in the whole batch; the tokens at
    hand are the whole where it is left out.
    """
    return (_relative_load(scores, topk_ids, counts) * _shares(scores).mean(dim=0)).sum()


def device_level_loss(
    scores: Tensor, topk_ids: Tensor, groups: int, counts: Tensor | None = None
) -> Tensor:
    """`sum_d f'_d P'_d` over equal groups of neighbouring experts (DeepSeekMoE, eq. 15-17).

    `f'_d` is the mean of the group's `f_i`, `P'_d` the sum of its `P_i`; `counts` as in
    `expert_level_loss`.
    """
    load = _relative_load(scores, topk_ids, counts).unflatten(0, (groups, -1)).mean(dim=1)
    share = _shares(scores).mean(dim=0).unflatten(0, (groups, -1)).sum(dim=1)
    return (load * share).sum()


def sequence_wise_loss(scores: Tensor, topk_ids: Tensor, seq: int) -> Tensor:
    """`sum_i f_i P_i` inside each sequence of `seq` tokens, averaged (DeepSeek-V3, eq. 17-20).

    `f_i` counts actual choices.
    """
    experts = scores.shape[1]
    mean_share = _shares(scores).unflatten(0, (-1, seq)).mean(dim=1)  # (sequences, experts)
    counts = chosen_experts(topk_ids, experts).unflatten(0, (-1, seq)).sum(dim=1)
    load = counts / counts.sum(dim=1, keepdim=True).clamp(min=1) * experts
    return (load * mean_share).sum(dim=1).mean()


def router_z_loss(router_logits: Tensor) -> Tensor:
    """Mean of `logsumexp(logits)^2` over tokens (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return router_logits.logsumexp(dim=-1).square().mean()


def load_balanced_l1(
    scores: Tensor, topk_ids: Tensor, top_k: int, counts: Tensor | None = None
) -> Tensor:
    """Mean over tokens of `sum_e f_e R_e` (ReMoE, Wang et al. 2024, load-balancing section).

    `R_e` are the ReLU router's outputs; `f_e = experts / (k * tokens) * choices of e` weighs
    busy experts' outputs more. It carries no gradient. `counts` as in `expert_level_loss`, scaled
    to as many tokens as are at hand.
    """
    tokens, experts = scores.shape
    if counts is None:
        counts = chosen_experts(topk_ids, experts).sum(dim=0)
    return (scores * (counts * experts / (top_k * tokens))).sum(dim=1).mean()


@dataclass
class AdaptiveL1:
    """ReMoE's weight of the L1 term: grows while too many experts fire, shrinks otherwise.

    `weight *= factor ** sign(target sparsity - sparsity)`, where sparsity is the share of
    experts that a token leaves idle and the target is `1 - k / experts`.
    """

    weight: float
    factor: float

    def update(self, mean_experts_per_token: float, top_k: int) -> None:
        """Adapt to the mean number of experts that a token used in this step."""
        excess = mean_experts_per_token - top_k
        if excess:
            self.weight *= self.factor ** math.copysign(1, excess)


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, speed: float) -> None:
    """Move `bias` against the load, in place: `b_i += speed * sign(mean(c) - c_i)`.

    (Wang et al. 2024, "Auxiliary-loss-free load balancing", algorithm 1; DeepSeek-V3, 2.1.2.)

    Args:
        bias: `(experts,)` float32, which enters the choice of experts only.
        counts: `(experts,)` tokens that each expert received in the step.
        speed: step of the bias; scores lie between zero and one.
    """
    load = counts.to(bias.dtype)
    bias.add_(torch.sign(load.mean() - load), alpha=speed)


@torch.no_grad()
def lowest_taken(scores: Tensor, topk_ids: Tensor) -> Tensor:
    """The lowest score at which each expert took a token, `(experts,)`; infinite if none."""
    taken = chosen_experts(topk_ids, scores.shape[1]) > 0
    return scores.masked_fill(~taken, torch.inf).amin(dim=0)


@torch.no_grad()
def update_threshold(threshold: Tensor, lowest: Tensor, rate: float) -> None:
    """Move expert choice's thresholds towards where a step cut off, in place.

    Args:
        threshold: `(experts,)` float32; all zero before the first step, which sets them.
        lowest: `(experts,)` lowest scores that were taken in the step.
        rate: share of the way; a moving average over about `1 / rate` steps.
    """
    if threshold.any():
        threshold.lerp_(lowest, rate)
    else:
        threshold.copy_(lowest)


def relative_load(counts: Tensor) -> Tensor:
    """Each expert's tokens over the mean, `(..., experts)`; one when the load is even."""
    load = counts.float()
    return load / load.mean(dim=-1, keepdim=True).clamp(min=1e-20)


def max_violation(counts: Tensor) -> Tensor:
    """MaxVio: the busiest expert's load over the mean, minus one (Wang et al. 2024, eq. 4)."""
    return relative_load(counts).amax(dim=-1) - 1


def load_entropy(counts: Tensor) -> Tensor:
    """Entropy of the load over `log(experts)`: one when it is even, zero for a single expert."""
    share = counts.float() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(dim=-1) / math.log(max(counts.shape[-1], 2))


def dead_share(counts: Tensor) -> Tensor:
    """Share of the experts that received no token."""
    return (counts == 0).float().mean(dim=-1)


def _shares(scores: Tensor) -> Tensor:
    """Each token's scores over their sum."""
    return scores / (scores.sum(dim=1, keepdim=True) + 1e-20)


def _relative_load(scores: Tensor, topk_ids: Tensor, counts: Tensor | None) -> Tensor:
    if counts is None:
        counts = chosen_experts(topk_ids, scores.shape[1]).sum(dim=0)
    return relative_load(counts)
