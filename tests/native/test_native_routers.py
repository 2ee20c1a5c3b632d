"""Native routers, steered or not, decide as the network's and as transformers' do."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from moescope.config import ModelConfig
from moescope.families import read_config
from moescope.kernels import cpu
from moescope.model.routing import ROUTERS, UNUSED, ReLU, Router
from moescope.model.steering import SteeredRouter, Steering
from moescope.native.router import native_router

pytestmark = pytest.mark.skipif(
    not cpu.available(), reason="tests/kernels/test_cpu.py says why this is fine"
)

HIDDEN, VOCAB, EXPERTS = 24, 50, 12


def config_of(topk_method: str, **more: Any) -> ModelConfig:
    fields = {
        "model_type": "deepseek_v2",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "moe_intermediate_size": 4,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "n_group": 3,
        "topk_group": 2,
        "topk_method": topk_method,
        "routed_scaling_factor": 1.5,
        **more,
    }
    return read_config(fields)


def router_of(config: ModelConfig, seed: int) -> Router:
    router = ROUTERS[config.topk_method](config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    router.weight.normal_(std=0.3, generator=generator)
    for bias in router.buffers():
        bias.normal_(std=0.1, generator=generator)
    return router


def same_decisions(gate: Router, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.randint(VOCAB, (tokens,), generator=generator)
    expected = gate(x, ids)
    native = native_router(gate)
    assert native is not None
    topk_ids, topk_weights = cpu.route(native, x, slots_of(gate), ids)
    assert not topk_weights[topk_ids == UNUSED].any()
    found = spread(topk_ids, topk_weights)
    torch.testing.assert_close(found, spread(expected.topk_ids, expected.topk_weights))


def slots_of(gate: Router) -> int:
    """Experts that a token visits at most."""
    steered = isinstance(gate, SteeredRouter)
    slots, rule = gate.top_k, gate.rule if steered else gate
    if isinstance(rule, ReLU):
        slots = (steered and gate.limit) or EXPERTS
    return max(slots, int(gate.forced.sum())) if steered else slots


def spread(topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Weights by expert, and which were chosen: `(2, tokens, experts)`."""
    shape = len(topk_ids), EXPERTS + 1  # the last column takes the unused
    ids = topk_ids.masked_fill(topk_ids == UNUSED, EXPERTS)
    chosen = torch.zeros(shape).scatter(1, ids, 1.0)
    return torch.stack([torch.zeros(shape).scatter(1, ids, topk_weights), chosen])[..., :EXPERTS]


rules = st.fixed_dictionaries(
    {
        "topk_method": st.sampled_from(
            ["greedy", "group_limited_greedy", "noaux_tc", "sinkhorn", "random", "relu"]
        ),
        "scoring_func": st.sampled_from(["softmax", "sigmoid"]),
        "norm_topk_prob": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(rule=rules, tokens=st.sampled_from([1, 2, 40]), seed=st.integers(0, 1000))
def test_native_routers_decide_as_the_network_does(
    rule: dict[str, Any], tokens: int, seed: int
) -> None:
    same_decisions(router_of(config_of(**rule), seed), tokens, seed)


@settings(max_examples=150, deadline=None)
@given(
    rule=rules,
    tokens=st.sampled_from([1, 2, 40]),
    top_k=st.one_of(st.none(), st.integers(1, EXPERTS)),
    swapped=st.sampled_from([None, None, "softmax", "sigmoid", "random", "relu"]),
    without_bias=st.booleans(),
    bias=st.dictionaries(st.integers(0, EXPERTS - 1), st.floats(-1, 1, width=16), max_size=4),
    named=st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=EXPERTS - 1),
    forced=st.integers(0, EXPERTS - 1),
    seed=st.integers(0, 1000),
)
def test_steered_routers_decide_as_on_pytorch(
    rule: dict[str, Any],
    tokens: int,
    top_k: int | None,
    swapped: Any,
    without_bias: bool,
    bias: dict[int, float],
    named: list[int],
    forced: int,
    seed: int,
) -> None:
    config = config_of(**rule)
    steering = Steering(
        num_experts_per_tok=top_k,
        rule=swapped,
        without_bias=without_bias,
        bias={(1, expert): value for expert, value in bias.items()},
        forced=[(1, expert) for expert in named[:forced]],
        disabled=[(1, expert) for expert in named[forced:]],
    )
    same_decisions(SteeredRouter(config, router_of(config, seed), 1, steering), tokens, seed)


def test_rules_that_the_kernels_lack_stay_with_pytorch() -> None:
    config = config_of("greedy")
    gate = router_of(config, 0)
    assert native_router(SteeredRouter(config, gate, 1, Steering(noise=0.1))) is None
    for topk_method in ("expert_choice", "hash"):
        assert native_router(ROUTERS[topk_method](config_of(topk_method))) is None


# --- what no router of the network has yet, against plain PyTorch ---------------------------------


@settings(max_examples=60, deadline=None)
@given(
    scoring=st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
    normalise=st.booleans(),
    biased=st.booleans(),
    top_k=st.integers(1, EXPERTS),
    tokens=st.sampled_from([1, 3, 40]),
    seed=st.integers(0, 1000),
)
def test_scores_biases_and_tables(
    scoring: str, normalise: bool, biased: bool, top_k: int, tokens: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 if scoring == "sqrtsoftplus" else 1.0  # great logits of the others tie
    weight = torch.randn(EXPERTS, HIDDEN, generator=generator) * size / HIDDEN**0.5
    x = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.randint(VOCAB, (tokens,), generator=generator)
    logit_bias, bias = torch.randn(2, EXPERTS, generator=generator) if biased else (None, None)
    table = torch.rand(VOCAB, EXPERTS, generator=generator).topk(top_k).indices
    logits = torch.nn.functional.linear(x, weight, logit_bias)
    scores = {
        "softmax": logits.softmax(dim=-1),
        "sigmoid": logits.sigmoid(),
        "sqrtsoftplus": torch.nn.functional.softplus(logits).sqrt(),
    }[scoring]
    for hashed in (False, True):
        rule = cpu.router(
            weight,
            top_k=top_k,
            logit_bias=logit_bias,
            bias=bias,
            scoring=scoring,
            normalise=normalise,
            factor=1.5,
            table=table if hashed else None,
        )
        chosen = table[ids] if hashed else (scores + (0 if bias is None else bias)).topk(top_k)[1]
        weights = scores.gather(1, chosen)
        if normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        found = spread(*cpu.route(rule, x, top_k, ids))
        torch.testing.assert_close(found, spread(chosen, weights * 1.5), rtol=1e-4, atol=1e-6)


def test_parts_that_do_not_fit_are_refused() -> None:
    weight = torch.ones(EXPERTS, HIDDEN)
    options: dict[str, Any] = {"scoring": "softmax", "normalise": True, "factor": 1.0, "top_k": 2}
    for wrong in (
        {"top_k": EXPERTS + 1},
        {"groups": 5},
        {"bias": torch.ones(EXPERTS + 1)},
        {"table": torch.zeros(VOCAB, 3, dtype=torch.int64)},
    ):
        with pytest.raises(ValueError, match="fit"):
            cpu.router(weight, **(options | wrong))
    with pytest.raises(ValueError, match="no such expert"):
        cpu.router(weight, disabled=[EXPERTS], **options)
    with pytest.raises(ValueError, match="no such expert"):
        cpu.router(weight, table=torch.full((VOCAB, 2), EXPERTS), **options)
    with pytest.raises(ValueError, match="scores are softmax"):
        cpu.router(weight, **(options | {"scoring": "tanh"}))
    hashed = cpu.router(weight, table=torch.zeros(VOCAB, 2, dtype=torch.int64), **options)
    with pytest.raises(ValueError, match="not in the table"):
        cpu.route(hashed, torch.ones(1, HIDDEN), 2, torch.tensor([VOCAB]))
    with pytest.raises(ValueError, match="do not fit the router"):
        cpu.route(hashed, torch.ones(1, HIDDEN), 2)
