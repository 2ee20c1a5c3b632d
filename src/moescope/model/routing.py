"""Every router: from a token's hidden state to its experts and their weights.

A router is a linear map to one logit per expert, and a rule that turns logits into a choice.
Each rule below is one class with one method; `ROUTERS` names them by `topk_method`, DeepSeek's
own field. Arithmetic is float32 whatever the model's type.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescope.config import ModelConfig

UNUSED = -1
"""Marks a slot of `topk_ids` that holds no expert (its weight is zero)."""


@dataclass(frozen=True)
class Routing:
    """What a router decided for a run of tokens."""

    router_logits: Tensor  # (tokens, n_routed_experts) float32
    scores: Tensor  # (tokens, n_routed_experts) float32, differentiable
    topk_ids: Tensor  # (tokens, slots) int64, UNUSED where a token has fewer experts
    topk_weights: Tensor  # (tokens, slots) float32
    by_table: bool = False  # whether the tokens' ids alone decided

    @classmethod
    def join(cls, parts: Sequence["Routing"]) -> "Routing":
        """Return that of a run of tokens of those of its parts, in order."""
        slots = max(part.topk_ids.shape[-1] for part in parts)

        def padded(tensor: Tensor, value: int) -> Tensor:
            return F.pad(tensor, (0, slots - tensor.shape[-1]), value=value)

        return cls(
            torch.cat([part.router_logits for part in parts]),
            torch.cat([part.scores for part in parts]),
            torch.cat([padded(part.topk_ids, UNUSED) for part in parts]),
            torch.cat([padded(part.topk_weights, 0) for part in parts]),
            parts[0].by_table,
        )

    @property
    def expert_counts(self) -> Tensor:
        """Tokens that each expert received, `(n_routed_experts,)` int64."""
        n_routed_experts = self.scores.shape[-1]
        return torch.bincount(self.topk_ids.flatten() + 1, minlength=n_routed_experts + 1)[1:]


class Peers(Protocol):
    """Other processes that hold as many tokens of the same micro batch each."""

    number: int  # of this one, from zero

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all of them, in order."""
        ...


class Router(nn.Module):
    """The linear map; subclasses choose. `weight` has shape `(n_routed_experts, hidden)`."""

    by_table = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_routed_experts = config.required("n_routed_experts")
        self.top_k = config.required("num_experts_per_tok")
        self.scoring_func = config.scoring_func
        self.softmax_after_topk = config.softmax_after_topk
        # A softmax over the chosen is the softmax over all, normalised.
        self.norm_topk_prob = config.norm_topk_prob or config.softmax_after_topk
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.n_routed_experts, config.hidden_size))
        self.bias: nn.Parameter | None = None
        if config.router_bias:
            self.bias = nn.Parameter(torch.zeros(self.n_routed_experts))

    def forward(self, hidden_states: Tensor, input_ids: Tensor) -> Routing:
        """Route `(tokens, hidden)`; `input_ids` `(tokens,)` matter to the hash router only."""
        router_logits = self.logits(hidden_states)
        scores = self.score(router_logits)  # (tokens, experts)
        topk_ids, topk_weights = self.choose(scores, router_logits, input_ids)
        return Routing(router_logits, scores, topk_ids, topk_weights, self.by_table)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Map `(tokens, hidden)` to one logit an expert, float32."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden_states.float(), self.weight.float(), bias)

    def score(self, router_logits: Tensor) -> Tensor:
        """Turn logits into scores: `softmax` over the experts, or a function of each alone."""
        if self.scoring_func == "sigmoid":
            return router_logits.sigmoid()
        if self.scoring_func == "sqrtsoftplus":  # DeepSeek-V4
            return F.softplus(router_logits).sqrt()
        return router_logits.softmax(dim=-1)

    def choose(
        self, scores: Tensor, router_logits: Tensor, input_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return `topk_ids` and `topk_weights`, `(tokens, slots)` each."""
        raise NotImplementedError

    def weigh(self, scores: Tensor, topk_ids: Tensor) -> Tensor:
        """Weights of chosen experts, `UNUSED` none: scores, normalised if asked, then scaled."""
        topk_weights = scores.gather(1, topk_ids.clamp(min=0)).masked_fill(topk_ids == UNUSED, 0.0)
        if self.norm_topk_prob:
            topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_weights * self.routed_scaling_factor


class Greedy(Router):
    """The `k` highest scores (DeepSeekMoE, eq. 3-5)."""

    def choose(
        self, scores: Tensor, router_logits: Tensor, input_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.softmax_after_topk:
            topk_logits, topk_ids = router_logits.topk(self.top_k, dim=-1)
            return topk_ids, topk_logits.softmax(dim=-1) * self.routed_scaling_factor
        topk_ids = scores.topk(self.top_k, dim=-1).indices
        return topk_ids, self.weigh(scores, topk_ids)


class GroupLimitedGreedy(Router):
    """The `k` highest scores inside the `topk_group` groups with the highest maximum.

    Experts of a group share a device, so a token travels to few devices (DeepSeek-V2, 2.2.2).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.n_group = config.required("n_group")
        self.topk_group = config.required("topk_group")

    def choose(
        self, scores: Tensor, router_logits: Tensor, input_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        grouped = scores.unflatten(-1, (self.n_group, -1))  # (tokens, groups, experts / groups)
        allowed = self.allow_groups(grouped.amax(dim=-1))
        topk_ids = scores.masked_fill(~allowed, 0.0).topk(self.top_k, dim=-1).indices
        return topk_ids, self.weigh(scores, topk_ids)

    def allow_groups(self, group_scores: Tensor) -> Tensor:
        """Which experts stand in the best groups: `(tokens, groups)` -> `(tokens, experts)`."""
        chosen = group_scores.topk(self.topk_group, dim=-1).indices
        groups = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen, True)
        return groups.repeat_interleave(self.n_routed_experts // self.n_group, dim=-1)


class NoAuxTopK(GroupLimitedGreedy):
    """DeepSeek-V3's choice without auxiliary loss (eq. 12-16 and `topk_method: noaux_tc`).

    A bias per expert, moved by the trainer against the load, enters the choice but not the
    weights. Groups are ranked by the sum of their two best biased scores.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        bias = torch.zeros(self.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def choose(
        self, scores: Tensor, router_logits: Tensor, input_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            biased = scores + self.e_score_correction_bias
            if self.topk_group < self.n_group:
                grouped = biased.unflatten(-1, (self.n_group, -1))
                best_two = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
                biased = biased.masked_fill(~self.allow_groups(best_two), -torch.inf)
            topk_ids = biased.topk(self.top_k, dim=-1).indices
        return topk_ids, self.weigh(scores, topk_ids)


class ReLU(Router):
    """ReMoE (Wang et al. 2024, eq. 6): every expert with a positive logit, weighed by it.

    Differentiable everywhere but at zero; how many experts a token gets is learned, and held
    near `num_experts_per_tok` on average by `balancing.AdaptiveL1`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm_topk_prob = False

    def score(self, router_logits: Tensor) -> Tensor:
        return router_logits.relu()

    def choose(
        self, scores: Tensor, router_logits: Tensor, input_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        slots = int((scores > 0).sum(dim=-1).max().clamp(min=1))
        topk_weights, topk_ids = scores.topk(slots, dim=-1)
        topk_ids = topk_ids.masked_fill(topk_weights == 0, UNUSED)
        return topk_ids, topk_weights * self.routed_scaling_factor


class CompetingRouter(Router):
    """A router for which the tokens of a micro batch compete in training.

    Attributes:
        peers: the ranks among which the micro batch is dealt; None where all of it is here.
    """

    peers: Peers | None = None

    def own_part(self, rule: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Apply a rule to the whole micro batch; return what it says of the tokens here.

        `rows` and what is returned are `(tokens, experts)`.
        """
        if self.peers is None:
            return rule(rows)
        start = self.peers.number * len(rows)
        return rule(self.peers.gather(rows))[start : start + len(rows)]


class ExpertChoice(CompetingRouter):
    """Each expert chooses tokens, not each token experts (Zhou et al. 2022, eq. 1).

    In training an expert takes the best `tokens * k / n_routed_experts` of the micro batch, which
    is perfectly balanced and looks at later tokens and other rows. No text can be written so: a
    single token would be every expert's best. Outside training an expert takes each token whose
    score reaches `score_threshold`, where training cut off of late (Expert Race, Yuan et al. 2025,
    learns such a threshold for images), so that a choice depends on the token alone. Without
    learned thresholds a token takes its k best experts.
    """

    score_threshold: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm_topk_prob = False
        threshold = torch.zeros(self.n_routed_experts, dtype=torch.float32)
        self.register_buffer("score_threshold", threshold)

    def choose(
        self, scores: Tensor, router_logits: Tensor, input_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            if self.training:
                taken = self.own_part(self.best_tokens, scores)
            else:
                taken = self.reached(scores)
        slots = int(taken.sum(dim=-1).max().clamp(min=1))
        topk_weights, topk_ids = scores.masked_fill(~taken, 0.0).topk(slots, dim=-1)
        topk_ids = topk_ids.masked_fill(~taken.gather(1, topk_ids), UNUSED)
        return topk_ids, topk_weights * self.routed_scaling_factor

    def best_tokens(self, scores: Tensor) -> Tensor:
        """Which tokens an expert takes when it sees all of them, `(tokens, experts)`."""
        tokens = scores.shape[0]
        capacity = min(tokens, -(-tokens * self.top_k // self.n_routed_experts))
        chosen = scores.topk(capacity, dim=0).indices  # (capacity, experts)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, chosen, True)

    def reached(self, scores: Tensor) -> Tensor:
        """Which experts take a token by its scores alone, `(tokens, experts)`."""
        if self.score_threshold.any():
            return scores >= self.score_threshold
        best = scores.topk(self.top_k, dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


class Sinkhorn(CompetingRouter):
    """A balanced assignment by Sinkhorn's iteration in training (Clark et al. 2022, S-BASE).

    The plan decides who goes where and carries no gradient; weights are the scores. Outside
    training the choice is greedy, as no batch is at hand to balance. In training the tokens that
    are balanced are those of a micro batch.
    """

    iterations = 8

    def choose(
        self, scores: Tensor, router_logits: Tensor, input_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            plan = self.own_part(self.balance, router_logits) if self.training else scores
            topk_ids = plan.topk(self.top_k, dim=-1).indices
        return topk_ids, self.weigh(scores, topk_ids)

    def balance(self, router_logits: Tensor) -> Tensor:
        """Return the log transport plan whose rows sum to one and whose columns are even."""
        tokens, experts = router_logits.shape
        plan = router_logits
        for _ in range(self.iterations):
            plan = plan - plan.logsumexp(dim=0, keepdim=True) + torch.tensor(tokens / experts).log()
            plan = plan - plan.logsumexp(dim=1, keepdim=True)
        return plan


class Hash(Router):
    """Experts fixed by the token's id, with equal weights (Roller et al. 2021): nothing learned."""

    by_table = True
    table: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.weight.requires_grad_(False)
        draws = torch.rand(
            config.vocab_size, self.n_routed_experts, generator=torch.Generator().manual_seed(0)
        )
        table = draws.topk(self.top_k, dim=-1).indices
        self.register_buffer("table", table, persistent=False)  # (vocab, k)

    def choose(
        self, scores: Tensor, router_logits: Tensor, input_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        topk_ids = self.table[input_ids]
        return topk_ids, self.weigh(scores, topk_ids)

    def weigh(self, scores: Tensor, topk_ids: Tensor) -> Tensor:
        """The same for each of the chosen experts."""
        return super().weigh(torch.full_like(scores, 1 / self.top_k), topk_ids)


class TokenTable(Router):
    """Experts fixed by the token's id, as a checkpoint's table says; weights are their scores.

    DeepSeek-V4's first layers (section 2.1), which `num_hash_layers` counts.
    """

    by_table = True
    tid2eid: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        table = torch.arange(config.vocab_size)[:, None] + torch.arange(self.top_k)
        self.register_buffer("tid2eid", table % self.n_routed_experts)  # (vocab, k)

    def choose(
        self, scores: Tensor, router_logits: Tensor, input_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        topk_ids = self.tid2eid[input_ids]
        return topk_ids, self.weigh(scores, topk_ids)


class RandomFrozen(Greedy):
    """Greedy over a random map that is never trained (Chen et al. 2023, SMoE-Dropout)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.weight.requires_grad_(False)


ROUTERS: dict[str, type[Router]] = {
    "greedy": Greedy,
    "group_limited_greedy": GroupLimitedGreedy,
    "noaux_tc": NoAuxTopK,
    "relu": ReLU,
    "expert_choice": ExpertChoice,
    "sinkhorn": Sinkhorn,
    "hash": Hash,
    "random": RandomFrozen,
}
