"""Routers' rules, as the kernels know them."""

from collections.abc import Sequence

from moescope.kernels import cpu
from moescope.model.routing import (
    Greedy,
    GroupLimitedGreedy,
    NoAuxTopK,
    RandomFrozen,
    ReLU,
    Router,
    Sinkhorn,
)
from moescope.model.steering import SteeredRouter

NATIVE_RULES = (Greedy, RandomFrozen, Sinkhorn, GroupLimitedGreedy, NoAuxTopK, ReLU)
"""Rules that the kernels know; Sinkhorn's outside training, where it is greedy."""


def native_routers(gates: Sequence[Router | None]) -> "list[cpu.Router | None] | None":
    """The same of each layer, None where it is dense; None if the kernels do not know a rule."""
    rules = [None if gate is None else native_router(gate) for gate in gates]
    known = all(gate is None or rule is not None for gate, rule in zip(gates, rules, strict=True))
    return rules if known else None


def native_router(gate: Router) -> "cpu.Router | None":
    """The same choice by the kernels; None if they do not know the gate's rule.

    The gate's weight is not copied.
    """
    steered = gate if isinstance(gate, SteeredRouter) else None
    rule = gate if steered is None else steered.rule
    if type(rule) not in NATIVE_RULES or (steered is not None and steered.noise):
        return None
    bias = rule.e_score_correction_bias if isinstance(rule, NoAuxTopK) else None
    top_k, relu = gate.top_k, isinstance(rule, ReLU)
    if relu:  # as many as have a positive logit, unless steering says how many at most
        top_k = (steered and steered.limit) or gate.n_routed_experts
    disabled: list[int] = []
    forced: list[int] = []
    if steered is not None:
        bias = steered.choice_bias
        disabled = steered.disabled.nonzero().flatten().tolist()
        forced = steered.forced.nonzero().flatten().tolist()
    grouped = isinstance(rule, GroupLimitedGreedy)
    return cpu.router(
        gate.weight,
        top_k=max(top_k, len(forced)),
        logit_bias=gate.bias,
        bias=bias,
        groups=rule.n_group if grouped else 1,
        kept_groups=rule.topk_group if grouped else 1,
        best_of_group=2 if isinstance(rule, NoAuxTopK) else 1,
        scoring="relu" if relu else rule.scoring_func,
        normalise=rule.norm_topk_prob,
        factor=rule.routed_scaling_factor,
        disabled=disabled,
        forced=forced,
    )
