"""What if the router decided otherwise: other rules, more experts, noise, experts off or forced.

`steered` makes a copy of a network that shares every weight with it; only the gates of the layers
that change are new. The network itself knows nothing of this and pays nothing for it.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.model.decoder import CausalLM
from moescope.model.moe import MoE
from moescope.model.routing import (
    ROUTERS,
    UNUSED,
    ExpertChoice,
    GroupLimitedGreedy,
    Hash,
    NoAuxTopK,
    ReLU,
    Router,
    Routing,
    TokenTable,
)

Rule = Literal["softmax", "sigmoid", "relu", "random"]

RULES: dict[str, dict[str, Any]] = {
    "softmax": {"topk_method": "greedy", "scoring_func": "softmax"},
    "sigmoid": {"topk_method": "greedy", "scoring_func": "sigmoid"},
    "relu": {"topk_method": "relu"},
    "random": {"topk_method": "random"},
}
"""The rules that a router can be given instead of its own, by what they change in the config."""

Expert = tuple[int, int]
"""A layer and an expert in it, both from 0."""


@dataclass(frozen=True)
class Steering:
    """Changes to every router of a model; by default none.

    Attributes:
        num_experts_per_tok: experts that a token visits. A ReLU router, which has no such number,
            visits at most as many; one that is limited to groups gets the groups it needs.
        rule: another rule over the same router logits: `softmax` or `sigmoid` (the `k` highest
            scores, without groups or balancing bias), `relu` (every expert with a positive
            logit), `random` (the `k` highest of a fixed random map, as spread as the learned one).
        without_bias: leave the balancing bias out of the choice.
        noise: standard deviation of a normal noise on the router logits.
        noise_seed: of that noise. It is drawn per layer and token id, so that a text gets the
            same noise whether it is read at once or token by token.
        bias: added to an expert's score (a ReLU router's logit) for the choice, as the balancing
            bias is. Where experts choose tokens it changes nothing.
        disabled: experts that nobody may choose; scores are as if they did not exist.
        forced: experts that every token visits, with the weight that their score gives. They
            take their place among the `num_experts_per_tok`.
    """

    num_experts_per_tok: int | None = None
    rule: Rule | None = None
    without_bias: bool = False
    noise: float = 0.0
    noise_seed: int = 0
    bias: Mapping[Expert, float] = field(default_factory=dict[Expert, float])
    disabled: Iterable[Expert] = frozenset()
    forced: Iterable[Expert] = frozenset()

    def __post_init__(self) -> None:
        """Refuse values that no model could follow.

        Raises:
            UserError: names the field, its value and the values allowed.
        """
        object.__setattr__(self, "disabled", frozenset(self.disabled))
        object.__setattr__(self, "forced", frozenset(self.forced))
        if self.rule is not None and self.rule not in RULES:
            raise UserError(f"rule is {self.rule!r}; choose from {', '.join(RULES)}")
        if not 0 <= self.noise < math.inf:
            raise UserError(f"noise is {self.noise}; it must be 0 or more, and finite")
        for (layer, expert), bias in self.bias.items():
            if not math.isfinite(bias):
                raise UserError(f"the bias of expert {layer}:{expert} is {bias}; give a number")
        for layer, expert in sorted(set(self.disabled) & set(self.forced)):
            raise UserError(
                f"expert {layer}:{expert} is both disabled and forced; choose one",
                "off_and_forced",
                layer=layer,
                expert=expert,
            )

    @property
    def changes_nothing(self) -> bool:
        """Whether every router stays as it is."""
        return not (
            self.num_experts_per_tok is not None
            or self.rule
            or self.without_bias
            or self.noise
            or any(self.bias.values())
            or self.disabled
            or self.forced
        )

    def in_layer(self, layer_idx: int) -> "Steering":
        """The same changes, with the experts of one layer only."""
        return Steering(
            self.num_experts_per_tok,
            self.rule,
            self.without_bias,
            self.noise,
            self.noise_seed,
            {expert: bias for expert, bias in self.bias.items() if expert[0] == layer_idx},
            frozenset(expert for expert in self.disabled if expert[0] == layer_idx),
            frozenset(expert for expert in self.forced if expert[0] == layer_idx),
        )


def steered(model: CausalLM, steering: Steering) -> CausalLM:
    """Return a copy of `model` whose routers decide as `steering` says; weights are shared.

    Routers of further-token prediction, which makes no text, stay as they are.

    Raises:
        UserError: the model has no routed experts, no such layer or expert, not so many experts,
            a layer would be left without any, or the model is steered already.
    """
    if steering.changes_nothing:
        return model
    changed, mixtures = steered_gates(model, steering), moe_layers(model)
    replaced = {id(mixtures[i].gate): gate for i, gate in changed.items()}
    # Only the modules on the way down to a new gate are copied; all others are shared.
    layers = model.model.layers
    way = {model, model.model, layers, *(layers[i] for i in changed)}
    way |= {mixtures[i] for i in changed}
    shared: list[object] = [module for module in model.modules() if module not in way]
    for module in way:  # what they hold beside modules, as the config or packed weights
        shared += [value for name, value in vars(module).items() if not name.startswith("_")]
    shared += [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(thing): thing for thing in shared} | replaced
    return copy.deepcopy(model, memo)


def steered_gates(model: CausalLM, steering: Steering) -> "dict[int, SteeredRouter]":
    """Return the gates, by layer index, of the layers of `model` that `steering` changes.

    Raises:
        UserError: as for `steered`.
    """
    gates = {layer_idx: moe.gate for layer_idx, moe in moe_layers(model).items()}
    if any(isinstance(gate, SteeredRouter) for gate in gates.values()):
        raise UserError("the model is steered already; name all changes at once")
    _check(steering, model.config, gates)
    changed = [i for i in gates if not steering.in_layer(i).changes_nothing]
    return {i: SteeredRouter(model.config, gates[i], i, steering) for i in changed}


def moe_layers(model: CausalLM) -> dict[int, MoE]:
    """The mixtures of experts by layer index, in order; empty in a dense model."""
    mlps = {layer_idx: layer.mlp for layer_idx, layer in enumerate(model.model.layers)}
    return {layer_idx: mlp for layer_idx, mlp in mlps.items() if isinstance(mlp, MoE)}


def _check(steering: Steering, config: ModelConfig, gates: dict[int, Router]) -> None:
    if not gates:
        raise UserError(
            "the model has no routed experts, so there is no router to change", "no_experts"
        )
    experts, top_k = config.required("n_routed_experts"), steering.num_experts_per_tok
    if top_k is not None and not 1 <= top_k <= experts:
        raise UserError(
            f"num_experts_per_tok is {top_k}; the model has 1 to {experts}",
            "experts_asked",
            n=top_k,
            max=experts,
        )
    for layer, expert in {*steering.bias, *steering.disabled, *steering.forced}:
        if layer not in gates:
            raise UserError(
                f"expert {layer}:{expert} is in no layer with routed experts; those layers are "
                f"{', '.join(map(str, gates))}",
                "dense_layer",
                layer=layer,
            )
        if not 0 <= expert < experts:
            raise UserError(
                f"there is no expert {expert} in layer {layer}; its experts are 0 to {experts - 1}",
                "no_expert",
                layer=layer,
                expert=expert,
                last=experts - 1,
            )
    for layer in gates:
        if len({e for e in steering.disabled if e[0] == layer}) == experts:
            raise UserError(
                f"all {experts} experts of layer {layer} are disabled; leave one",
                "all_disabled",
                n=experts,
                layer=layer,
            )


class SteeredRouter(Router):
    """A gate with changes: it shares the gate's map and follows its rule, or another one."""

    def __init__(
        self, config: ModelConfig, gate: Router, layer_idx: int, steering: Steering
    ) -> None:
        super().__init__(config)
        experts, device = self.n_routed_experts, gate.weight.device
        self.layer_idx = layer_idx
        self.noise, self.noise_seed = steering.noise, steering.noise_seed
        self.limit = steering.num_experts_per_tok
        self.top_k = self.limit or self.top_k
        self.weight, self.bias = gate.weight, gate.bias
        if steering.rule == "random":
            self.weight = _random_map(gate.weight, layer_idx)
        self.rule = _make_rule(config, self.top_k, steering.rule)
        if isinstance(gate, TokenTable) and steering.rule is None:
            self.rule = TokenTable(config)
            self.rule.tid2eid = gate.tid2eid
        self.rule.weight = self.weight
        if (
            isinstance(self.rule, ExpertChoice)
            and isinstance(gate, ExpertChoice)
            and self.top_k == gate.top_k  # thresholds belong to a number of experts
        ):
            self.rule.score_threshold = gate.score_threshold
        self.choice_bias = torch.zeros(experts, device=device)  # (experts,)
        if isinstance(gate, NoAuxTopK) and steering.rule is None and not steering.without_bias:
            self.choice_bias = self.choice_bias + gate.e_score_correction_bias
        for (layer, expert), bias in steering.bias.items():
            if layer == layer_idx:
                self.choice_bias[expert] += bias
        self.disabled = _mask(steering.disabled, layer_idx, experts, device)  # (experts,)
        self.forced = _mask(steering.forced, layer_idx, experts, device)  # (experts,)

    def forward(self, hidden_states: Tensor, input_ids: Tensor) -> Routing:
        router_logits = self.logits(hidden_states)
        if self.noise:
            router_logits = router_logits + self.noise * self._draw(input_ids)
        scores = self.score(router_logits)  # (tokens, experts)
        topk_ids, topk_weights = self.choose(scores, router_logits, input_ids)
        return Routing(router_logits, scores, topk_ids, topk_weights, self.rule.by_table)

    def score(self, router_logits: Tensor) -> Tensor:
        return self.rule.score(router_logits.masked_fill(self.disabled, -torch.inf))

    def choose(
        self, scores: Tensor, router_logits: Tensor, input_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        preference = self.choice_scores(scores, router_logits, input_ids)
        preference = preference.masked_fill(self.forced, torch.inf)
        most = int((preference > -torch.inf).sum(dim=-1).max().clamp(min=1))
        slots = min(most, max(self._slots(most), int(self.forced.sum())))
        best = preference.topk(slots, dim=-1)
        topk_ids = best.indices.masked_fill(best.values == -torch.inf, UNUSED)
        return topk_ids, self.rule.weigh(scores, topk_ids)

    def _slots(self, most: int) -> int:
        """Experts that a token visits at most, if `most` are left to choose from."""
        if isinstance(self.rule, ReLU):
            return self.limit or most
        return most if isinstance(self.rule, ExpertChoice) else self.top_k

    def choice_scores(self, scores: Tensor, router_logits: Tensor, input_ids: Tensor) -> Tensor:
        """What the choice goes by, `(tokens, experts)`; -inf for experts that are ruled out."""
        if isinstance(self.rule, ReLU):
            preference = router_logits + self.choice_bias
            preference = preference.masked_fill(preference <= 0, -torch.inf)
        elif isinstance(self.rule, ExpertChoice):
            preference = (scores + self.choice_bias).masked_fill(self.disabled, -torch.inf)
            preference = preference.masked_fill(~self.rule.reached(preference), -torch.inf)
        elif isinstance(self.rule, Hash):
            order = self.rule.table[input_ids]  # (tokens, experts), the first choice first
            falling = torch.linspace(1, 0, order.shape[1], device=order.device).expand(order.shape)
            preference = torch.empty_like(scores).scatter_(1, order, falling) + self.choice_bias
        elif isinstance(self.rule, TokenTable):
            order = self.rule.tid2eid[input_ids]  # (tokens, k), before all others
            falling = torch.linspace(2, 1, order.shape[1], device=order.device).expand(order.shape)
            others = scores - scores.amax(dim=-1, keepdim=True)
            preference = others.scatter(1, order, falling) + self.choice_bias
        else:
            preference = scores + self.choice_bias
        preference = preference.masked_fill(self.disabled, -torch.inf)
        if isinstance(self.rule, GroupLimitedGreedy) and self.rule.topk_group < self.rule.n_group:
            preference = self._within_groups(self.rule, preference)
        return preference

    def _within_groups(self, rule: GroupLimitedGreedy, preference: Tensor) -> Tensor:
        grouped = preference.unflatten(-1, (rule.n_group, -1))  # (tokens, groups, experts / groups)
        if isinstance(rule, NoAuxTopK):
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values
            second = best[..., 1:].masked_fill(best[..., 1:] == -torch.inf, 0.0).sum(dim=-1)
            group_scores = best[..., 0] + second
        else:
            group_scores = grouped.amax(dim=-1)
        return preference.masked_fill(~rule.allow_groups(group_scores), -torch.inf)

    def _draw(self, input_ids: Tensor) -> Tensor:
        """Normal numbers `(tokens, experts)` that follow from seed, layer and token id alone."""
        ids, place = input_ids.unique(return_inverse=True)
        key = (self.noise_seed * 1_000_003 + self.layer_idx) * 1_000_003
        generator = torch.Generator()
        rows = [
            torch.randn(
                self.n_routed_experts, generator=generator.manual_seed((key + token_id) % 2**63)
            )
            for token_id in ids.tolist()
        ]
        return torch.stack(rows).to(self.weight.device)[place]


def _make_rule(config: ModelConfig, top_k: int, swapped: Rule | None) -> Router:
    """The rule to follow, as a router of its own of which only the arithmetic is used."""
    fields: dict[str, Any] = {"topk_method": config.topk_method, "num_experts_per_tok": top_k}
    fields |= RULES[swapped] if swapped else {}
    method = fields["topk_method"]
    if method == "hash":  # its table then ranks them all
        fields |= {"num_experts_per_tok": config.n_routed_experts, "norm_topk_prob": True}
    if method in ("group_limited_greedy", "noaux_tc"):
        group = config.required("n_routed_experts") // config.required("n_group")
        fields["topk_group"] = max(config.required("topk_group"), -(-top_k // group))
    return ROUTERS[method](config.model_copy(update=fields)).eval()


def _random_map(weight: Tensor, layer_idx: int) -> torch.nn.Parameter:
    """A map of the same shape and spread as `weight`, fixed for each layer."""
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer_idx))
    drawn = drawn.to(weight.device) * weight.float().std()
    return torch.nn.Parameter(drawn, requires_grad=False)


def _mask(
    experts: Iterable[Expert], layer_idx: int, n_routed_experts: int, device: torch.device
) -> Tensor:
    """One where an expert of this layer is named: `(n_routed_experts,)` bool."""
    mask = torch.zeros(n_routed_experts, dtype=torch.bool, device=device)
    mask[[expert for layer, expert in experts if layer == layer_idx]] = True
    return mask
