"""Every router against its paper's formula in float64, and by properties over odd shapes."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, strategies as st
from torch import Tensor

from moescope.families import read_config
from moescope.model.routing import ROUTERS, UNUSED, Router, Routing

HIDDEN, VOCAB = 8, 50
CHOOSE_EXACTLY_K = ("greedy", "group_limited_greedy", "noaux_tc", "sinkhorn", "hash", "random")


def router_of(topk_method: str, n_group: int, group_size: int, top_k: int, **more: Any) -> Router:
    fields = {
        "model_type": "deepseek_v3" if topk_method == "noaux_tc" else "deepseek_v2",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "moe_intermediate_size": 4,
        "n_routed_experts": n_group * group_size,
        "num_experts_per_tok": top_k,
        "n_group": n_group,
        "topk_group": n_group,
        "topk_method": topk_method,
        **more,
    }
    router = ROUTERS[topk_method](read_config(fields))
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=chance(11)))
    return router


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def route(router: Router, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Routing]:
    hidden_states = torch.randn(tokens, HIDDEN, generator=chance(seed))
    input_ids = torch.randint(VOCAB, (tokens,), generator=chance(seed))
    return hidden_states, input_ids, router(hidden_states, input_ids)


def formula(topk_method: str, scoring_func: str, logits: Tensor) -> Tensor:
    if topk_method == "relu":
        return logits.clamp(min=0)
    if scoring_func == "sigmoid":
        return 1 / (1 + (-logits).exp())
    return logits.exp() / logits.exp().sum(dim=-1, keepdim=True)


def assume_no_close_ties(values: Tensor) -> None:
    """Float32 may order differently what is nearly equal in float64 `(tokens, choices)`."""
    gaps = values.detach().sort(dim=-1).values.diff(dim=-1)
    assume(gaps.numel() == 0 or float(gaps.min()) > 1e-5)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int]:
    n_group, group_size = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    top_k = draw(st.integers(1, n_group * group_size))
    return {"n_group": n_group, "group_size": group_size, "top_k": top_k}


TOKENS, SEEDS = st.integers(1, 40), st.integers(0, 1000)


@pytest.mark.parametrize("topk_method", CHOOSE_EXACTLY_K)
@given(shape=shapes(), tokens=TOKENS, seed=SEEDS)
def test_exactly_k_different_experts_are_chosen(
    topk_method: str, shape: dict[str, int], tokens: int, seed: int
) -> None:
    router = router_of(topk_method, **shape)
    _, _, routing = route(router, tokens, seed)
    assert routing.topk_ids.shape == routing.topk_weights.shape == (tokens, shape["top_k"])
    assert all(len(set(row)) == shape["top_k"] for row in routing.topk_ids.tolist())
    assert (
        int(routing.topk_ids.min()) >= 0 and int(routing.topk_ids.max()) < router.n_routed_experts
    )
    assert int(routing.expert_counts.sum()) == tokens * shape["top_k"]


@pytest.mark.parametrize("topk_method", ROUTERS)
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_the_formula_in_float32_whatever_the_models_type(
    topk_method: str, scoring_func: str, dtype: torch.dtype
) -> None:
    router = router_of(topk_method, 1, 7, 3, scoring_func=scoring_func).to(dtype)
    hidden_states = torch.randn(13, HIDDEN, generator=chance(1)).to(dtype)
    routing = router(hidden_states, torch.arange(13))
    logits = hidden_states.double() @ router.weight.double().T
    scores = formula(topk_method, scoring_func, logits)
    assert routing.router_logits.dtype == routing.scores.dtype == torch.float32
    assert routing.topk_weights.dtype == torch.float32
    torch.testing.assert_close(routing.router_logits.double(), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routing.scores.double(), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "topk_method", ["greedy", "group_limited_greedy", "noaux_tc", "sinkhorn", "random"]
)
@given(shape=shapes(), tokens=TOKENS, seed=SEEDS)
def test_normalised_weights_sum_to_the_scaling_factor(
    topk_method: str, shape: dict[str, int], tokens: int, seed: int
) -> None:
    router = router_of(topk_method, **shape, norm_topk_prob=True, routed_scaling_factor=1.7)
    _, _, routing = route(router, tokens, seed)
    torch.testing.assert_close(routing.topk_weights.sum(dim=-1), torch.full((tokens,), 1.7))
    assert bool((routing.topk_weights > 0).all())


@given(shape=shapes(), tokens=TOKENS, seed=SEEDS)
def test_greedy_takes_the_highest_softmax_scores(
    shape: dict[str, int], tokens: int, seed: int
) -> None:
    """DeepSeekMoE, eq. 3-5."""
    router = router_of("greedy", **shape, routed_scaling_factor=3.0)
    hidden_states, _, routing = route(router, tokens, seed)
    logits = hidden_states.double() @ router.weight.double().T
    assume_no_close_ties(logits)
    scores = logits.softmax(dim=-1)
    best = scores.sort(dim=-1, descending=True)
    assert torch.equal(routing.topk_ids, best.indices[:, : shape["top_k"]])
    expected = best.values[:, : shape["top_k"]] * 3.0
    torch.testing.assert_close(routing.topk_weights.double(), expected, rtol=1e-4, atol=1e-6)


@st.composite
def limited_shapes(draw: st.DrawFn) -> dict[str, int]:
    n_group, group_size = draw(st.integers(2, 6)), draw(st.integers(2, 6))
    topk_group = draw(st.integers(1, n_group - 1))
    top_k = draw(st.integers(1, topk_group * group_size))
    return {"n_group": n_group, "group_size": group_size, "top_k": top_k, "topk_group": topk_group}


@given(shape=limited_shapes(), tokens=TOKENS, seed=SEEDS)
def test_group_limits_allow_the_groups_with_the_highest_score(
    shape: dict[str, int], tokens: int, seed: int
) -> None:
    """DeepSeek-V2, 2.2.2, token by token."""
    router = router_of("group_limited_greedy", **shape)
    _, _, routing = route(router, tokens, seed)
    size = shape["group_size"]
    for scores, chosen in zip(routing.scores.tolist(), routing.topk_ids.tolist(), strict=True):
        groups = sorted(
            range(shape["n_group"]), key=lambda g: -max(scores[g * size : (g + 1) * size])
        )[: shape["topk_group"]]
        allowed = [e for g in groups for e in range(g * size, (g + 1) * size)]
        assert chosen == sorted(allowed, key=lambda e: -scores[e])[: shape["top_k"]]


@given(shape=limited_shapes(), tokens=TOKENS, seed=SEEDS)
def test_the_correction_bias_chooses_and_does_not_weigh(
    shape: dict[str, int], tokens: int, seed: int
) -> None:
    """DeepSeek-V3, eq. 12-16, with groups ranked by their two best biased scores."""
    router = router_of("noaux_tc", **shape, norm_topk_prob=True, routed_scaling_factor=2.5)
    bias = torch.randn(router.n_routed_experts, generator=chance(seed + 1))
    router.e_score_correction_bias.copy_(bias)
    hidden_states, _, routing = route(router, tokens, seed)
    scores = (hidden_states.double() @ router.weight.double().T).sigmoid()
    size = shape["group_size"]
    assume_no_close_ties(scores + bias)
    groups_best = (scores + bias).unflatten(-1, (-1, size)).topk(2, dim=-1).values.sum(dim=-1)
    assume_no_close_ties(groups_best)
    for token in range(tokens):
        biased = (scores[token] + bias.double()).tolist()
        best_two = [
            sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(shape["n_group"])
        ]
        groups = sorted(range(shape["n_group"]), key=lambda g: -best_two[g])[: shape["topk_group"]]
        allowed = [e for g in groups for e in range(g * size, (g + 1) * size)]
        expected = sorted(allowed, key=lambda e: -biased[e])[: shape["top_k"]]
        assert routing.topk_ids[token].tolist() == expected
        weights = scores[token, expected] / scores[token, expected].sum() * 2.5
        torch.testing.assert_close(
            routing.topk_weights[token].double(), weights, rtol=1e-4, atol=1e-6
        )


@given(shape=shapes(), tokens=TOKENS, seed=SEEDS)
def test_relu_uses_every_expert_with_a_positive_logit(
    shape: dict[str, int], tokens: int, seed: int
) -> None:
    """ReMoE, eq. 6."""
    router = router_of("relu", **shape, routed_scaling_factor=1.5)
    hidden_states, _, routing = route(router, tokens, seed)
    logits = hidden_states.double() @ router.weight.double().T
    assume(float(logits.detach().abs().min()) > 1e-5)
    gates = logits.clamp(min=0) * 1.5
    for row, ids, weights in zip(gates, routing.topk_ids, routing.topk_weights, strict=True):
        used = ids != UNUSED
        assert set(ids[used].tolist()) == set(row.nonzero()[:, 0].tolist())
        torch.testing.assert_close(weights[used].double(), row[ids[used]], rtol=1e-4, atol=1e-6)
        assert not weights[~used].any()


@given(shape=shapes(), tokens=TOKENS, seed=SEEDS)
def test_expert_choice_gives_every_expert_its_best_tokens(
    shape: dict[str, int], tokens: int, seed: int
) -> None:
    """Zhou et al. 2022, eq. 1: the same number of tokens for every expert, in training."""
    router = router_of("expert_choice", **shape, routed_scaling_factor=1.5).train()
    _, _, routing = route(router, tokens, seed)
    experts = router.n_routed_experts
    capacity = min(tokens, -(-tokens * shape["top_k"] // experts))
    assert routing.expert_counts.tolist() == [capacity] * experts
    for expert in range(experts):
        got = (routing.topk_ids == expert).any(dim=-1).nonzero()[:, 0].tolist()
        best = routing.scores[:, expert].argsort(descending=True)[:capacity].tolist()
        assert sorted(got) == sorted(best)
    used = routing.topk_ids != UNUSED
    expected = routing.scores.gather(1, routing.topk_ids.clamp(min=0)) * 1.5 * used
    torch.testing.assert_close(routing.topk_weights, expected)


@given(shape=shapes(), tokens=TOKENS, seed=SEEDS, learned=st.booleans())
def test_expert_choice_outside_training_depends_on_the_token_alone(
    shape: dict[str, int], tokens: int, seed: int, learned: bool
) -> None:
    """Thresholds decide, or a token's k best where none were learned; nobody takes everything."""
    router = router_of("expert_choice", **shape, routed_scaling_factor=1.5).eval()
    experts, threshold = router.n_routed_experts, router.get_buffer("score_threshold")
    if learned:
        threshold.copy_(torch.rand(experts, generator=chance(seed)) / experts + 1e-4)
    hidden_states, input_ids, routing = route(router, tokens, seed)
    for at in range(tokens):
        scores = routing.scores[at].tolist()
        ranked = sorted(range(experts), key=lambda expert: -scores[expert])
        expected = set(ranked[: shape["top_k"]])
        if learned:
            limits = threshold.tolist()
            expected = {e for e in range(experts) if scores[e] >= limits[e]}
        together = routing.topk_ids[at]
        alone = router(hidden_states[at : at + 1], input_ids[at : at + 1]).topk_ids[0]
        assert set(together[together != UNUSED].tolist()) == expected
        assert set(alone[alone != UNUSED].tolist()) == expected


@given(shape=shapes(), tokens=TOKENS, seed=SEEDS)
def test_sinkhorn_follows_the_balanced_plan_in_training_and_the_scores_outside(
    shape: dict[str, int], tokens: int, seed: int
) -> None:
    """Clark et al. 2022: columns and rows of `exp(logits)` are scaled in turn; scores weigh."""
    router = router_of("sinkhorn", **shape, routed_scaling_factor=1.5).train()
    hidden_states, input_ids, trained = route(router, tokens, seed)
    expected = (hidden_states.double() @ router.weight.double().T).exp()
    for _ in range(8):
        expected = expected / expected.sum(dim=0) * tokens / router.n_routed_experts
        expected = expected / expected.sum(dim=1, keepdim=True)
    plan: Tensor = router.balance(trained.router_logits).exp()  # type: ignore[operator]
    torch.testing.assert_close(plan.double(), expected, rtol=1e-3, atol=1e-6)
    greedy = router.eval()(hidden_states, input_ids)
    for routing, chosen_by in ((trained, plan), (greedy, greedy.scores)):
        best = chosen_by.topk(shape["top_k"], dim=-1).indices
        assert routing.topk_ids.sort(dim=-1).values.equal(best.sort(dim=-1).values)
        weights = routing.scores.gather(1, routing.topk_ids) * 1.5
        torch.testing.assert_close(routing.topk_weights, weights)


@pytest.mark.parametrize("seed", range(5))
def test_sinkhorn_evens_out_a_skewed_load(seed: int) -> None:
    router = router_of("sinkhorn", 1, 6, 1)
    hidden_states = torch.randn(300, HIDDEN, generator=chance(seed)) + 1.0
    ids = torch.zeros(300, dtype=torch.int64)
    balanced, greedy = router.train()(hidden_states, ids), router.eval()(hidden_states, ids)
    assert int(greedy.expert_counts.max()) > 100  # 50 would be even
    assert int(balanced.expert_counts.max()) < 75


@given(shape=shapes(), seed=SEEDS)
def test_hash_depends_on_the_token_id_alone(shape: dict[str, int], seed: int) -> None:
    router = router_of("hash", **shape, routed_scaling_factor=2.0)
    ids = torch.randint(VOCAB, (20,), generator=chance(seed))
    first = router(torch.randn(20, HIDDEN, generator=chance(seed)), ids)
    second = router(torch.randn(20, HIDDEN, generator=chance(seed + 1)), ids)
    assert torch.equal(first.topk_ids, second.topk_ids)
    assert torch.equal(
        router_of("hash", **shape)(torch.zeros(20, HIDDEN), ids).topk_ids, first.topk_ids
    )
    torch.testing.assert_close(
        first.topk_weights, torch.full_like(first.topk_weights, 2.0 / shape["top_k"])
    )


@pytest.mark.parametrize("topk_method", ROUTERS)
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_gradients_flow_where_promised_and_nowhere_else(
    topk_method: str, scoring_func: str, norm_topk_prob: bool
) -> None:
    """Held to autograd of the formula in float64, experts being the same."""
    more = {"norm_topk_prob": norm_topk_prob, "routed_scaling_factor": 1.5}
    router = router_of(topk_method, 2, 4, 3, scoring_func=scoring_func, **more)
    if topk_method == "noaux_tc":
        router.e_score_correction_bias.copy_(torch.randn(8, generator=chance(8)))
    hidden_states, input_ids, _ = route(router, 9, seed=5)
    hidden_states.requires_grad_()
    routing = router(hidden_states, input_ids)
    mixture = torch.randn(routing.topk_weights.shape, generator=chance(6))
    loss = (routing.topk_weights * mixture).sum()
    assert all(not buffer.requires_grad for buffer in router.buffers())
    if topk_method == "hash":
        assert not loss.requires_grad
        return
    loss.backward()

    exact_states = hidden_states.detach().double().requires_grad_()
    exact_map = router.weight.detach().double().requires_grad_()
    scores = formula(topk_method, scoring_func, exact_states @ exact_map.T)
    weights = scores.gather(1, routing.topk_ids.clamp(min=0)) * (routing.topk_ids != UNUSED)
    if norm_topk_prob and topk_method not in ("relu", "expert_choice"):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    (weights * 1.5 * mixture).sum().backward()
    pairs = [(hidden_states.grad, exact_states.grad)]
    if topk_method == "random":
        assert router.weight.grad is None
    else:
        pairs.append((router.weight.grad, exact_map.grad))
    for got, wanted in pairs:
        assert got is not None and wanted is not None and bool(wanted.any())
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-5)
