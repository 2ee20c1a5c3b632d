"""Steered routers against their own classes, and by properties over odd shapes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from moescope.api import Model
from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.families import read_config
from moescope.model.decoder import CausalLM, initialise
from moescope.model.moe import MoE
from moescope.model.routing import ROUTERS, UNUSED, Router, Routing
from moescope.model.steering import SteeredRouter, Steering, moe_layers, steered

HIDDEN, VOCAB, EXPERTS, LAYER = 8, 50, 12, 2
TOKEN_CHOICE = ("greedy", "group_limited_greedy", "noaux_tc", "sinkhorn", "hash", "random")


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
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        **more,
    }
    return read_config(fields)


def router_of(config: ModelConfig) -> Router:
    router = ROUTERS[config.topk_method](config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        for bias in router.buffers():
            if bias.is_floating_point():
                bias.copy_(torch.randn(bias.shape, generator=generator) * 0.1)
    return router


def text(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(tokens, HIDDEN, generator=generator)
    return hidden_states, torch.randint(VOCAB, (tokens,), generator=generator)


def route(topk_method: str, tokens: int = 30, seed: int = 0, **changes: Any) -> Routing:
    config = config_of(topk_method)
    router = SteeredRouter(config, router_of(config), LAYER, Steering(**changes))
    with torch.inference_mode():
        return router(*text(tokens, seed))


def weights_by_expert(routing: Routing) -> Tensor:
    """`(tokens, experts)`: zero where an expert was not chosen."""
    spread = torch.zeros(len(routing.scores), EXPERTS + 1)
    return spread.scatter_(1, routing.topk_ids + 1, routing.topk_weights)[:, 1:]


def chosen(routing: Routing) -> Tensor:
    """`(tokens, experts)` bool."""
    spread = torch.zeros(len(routing.scores), EXPERTS + 1, dtype=torch.bool)
    return spread.scatter_(1, routing.topk_ids + 1, True)[:, 1:]


ALL_METHODS = pytest.mark.parametrize("topk_method", ROUTERS)
SOME_EXPERTS = st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS - 1)
few = settings(max_examples=15)
TOKENS, SEEDS = st.integers(1, 30), st.integers(0, 1000)


@ALL_METHODS
@few
@given(tokens=TOKENS, seed=SEEDS)
def test_without_a_change_the_choice_is_the_gates_own(
    topk_method: str, tokens: int, seed: int
) -> None:
    config = config_of(topk_method)
    gate = router_of(config)
    with torch.inference_mode():
        ours = SteeredRouter(config, gate, LAYER, Steering())(*text(tokens, seed))
        theirs = gate(*text(tokens, seed))
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(weights_by_expert(ours), weights_by_expert(theirs))
    assert torch.equal(chosen(ours), chosen(theirs))


@ALL_METHODS
@few
@given(experts=SOME_EXPERTS, tokens=TOKENS, seed=SEEDS, top_k=st.integers(1, EXPERTS))
def test_a_disabled_expert_is_never_chosen(
    topk_method: str, experts: set[int], tokens: int, seed: int, top_k: int
) -> None:
    disabled = {(LAYER, expert) for expert in experts}
    routing = route(topk_method, tokens, seed, num_experts_per_tok=top_k, disabled=disabled)
    assert not chosen(routing)[:, sorted(experts)].any()
    assert not routing.topk_weights[routing.topk_ids == UNUSED].any()
    assert routing.topk_weights.isfinite().all()
    assert chosen(routing).sum(dim=-1).max() <= EXPERTS - len(experts)


@pytest.mark.parametrize("topk_method", ["greedy", "sinkhorn", "relu"])
@few
@given(experts=SOME_EXPERTS, seed=SEEDS)
def test_the_others_choose_as_if_a_disabled_expert_did_not_exist(
    topk_method: str, experts: set[int], seed: int
) -> None:
    left = [expert for expert in range(EXPERTS) if expert not in experts]
    top_k = min(3, len(left))
    routing = route(
        topk_method,
        seed=seed,
        num_experts_per_tok=None if topk_method == "relu" else top_k,
        disabled={(LAYER, expert) for expert in experts},
    )
    smaller = config_of(topk_method, n_routed_experts=len(left), num_experts_per_tok=top_k)
    router = ROUTERS[topk_method](smaller).eval()
    with torch.inference_mode():
        router.weight.copy_(router_of(config_of(topk_method)).weight[left])
        expected = router(*text(30, seed))
    spread = torch.zeros(30, len(left) + 1)
    spread.scatter_(1, expected.topk_ids + 1, expected.topk_weights)
    torch.testing.assert_close(weights_by_expert(routing)[:, left], spread[:, 1:])


@ALL_METHODS
@few
@given(expert=st.integers(0, EXPERTS - 1), tokens=TOKENS, seed=SEEDS)
def test_a_forced_expert_is_always_there(
    topk_method: str, expert: int, tokens: int, seed: int
) -> None:
    plain = route(topk_method, tokens, seed)
    routing = route(topk_method, tokens, seed, forced={(LAYER, expert)})
    assert chosen(routing)[:, expert].all()
    if topk_method in TOKEN_CHOICE:
        assert (chosen(routing).sum(dim=-1) == 3).all()
    already = chosen(plain)[:, expert]
    torch.testing.assert_close(
        weights_by_expert(routing)[already], weights_by_expert(plain)[already]
    )


@pytest.mark.parametrize("topk_method", [*TOKEN_CHOICE, "expert_choice"])
@few
@given(tokens=TOKENS, seed=SEEDS)
def test_every_expert_is_visited_with_k_of_all(topk_method: str, tokens: int, seed: int) -> None:
    routing = route(topk_method, tokens, seed, num_experts_per_tok=EXPERTS)
    assert chosen(routing).all()
    if topk_method not in ("expert_choice", "hash"):
        expected = routing.scores / routing.scores.sum(dim=-1, keepdim=True) * 1.5
        torch.testing.assert_close(weights_by_expert(routing), expected)


@few
@given(top_k=st.integers(1, EXPERTS), seed=SEEDS)
def test_a_relu_router_visits_at_most_k_of_its_experts(top_k: int, seed: int) -> None:
    whole = route("relu", seed=seed)
    routing = route("relu", seed=seed, num_experts_per_tok=top_k)
    assert torch.equal(chosen(routing).sum(dim=-1), chosen(whole).sum(dim=-1).clamp(max=top_k))
    assert (chosen(whole) | ~chosen(routing)).all()


@pytest.mark.parametrize("topk_method", ROUTERS)
@pytest.mark.parametrize("rule", ["softmax", "sigmoid", "relu"])
def test_another_rule_is_that_routers_own_class_over_the_same_map(
    topk_method: str, rule: str
) -> None:
    method = "relu" if rule == "relu" else "greedy"
    scoring = {} if rule == "relu" else {"scoring_func": rule}
    config = config_of(method, **scoring)
    expected = ROUTERS[method](config).eval()
    with torch.inference_mode():
        expected.weight.copy_(router_of(config_of(topk_method)).weight)
        theirs = expected(*text(30, 0))
    ours = route(topk_method, rule=rule)
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.topk_ids, theirs.topk_ids)
    assert torch.equal(ours.topk_weights, theirs.topk_weights)


def test_the_random_rule_is_a_fixed_map_as_spread_as_the_learned_one() -> None:
    config = config_of("greedy")
    gate = router_of(config)
    one, two = (SteeredRouter(config, gate, LAYER, Steering(rule="random")) for _ in range(2))
    assert torch.equal(one.weight, two.weight) and not torch.equal(one.weight, gate.weight)
    other_layer = SteeredRouter(config, gate, LAYER + 1, Steering(rule="random"))
    assert not torch.equal(one.weight, other_layer.weight)
    assert 0.7 < float((one.weight.std() / gate.weight.std()).detach()) < 1.4
    expected = ROUTERS["random"](config_of("random"))
    with torch.inference_mode():
        expected.weight.copy_(one.weight)
        assert torch.equal(one(*text(30, 0)).topk_ids, expected(*text(30, 0)).topk_ids)


def test_without_bias_scores_alone_choose() -> None:
    config = config_of("noaux_tc", topk_group=3)
    gate = router_of(config)
    with torch.inference_mode():
        routing = SteeredRouter(config, gate, LAYER, Steering(without_bias=True))(*text(30, 0))
        biased = gate(*text(30, 0))
    best = routing.scores.topk(3).indices
    assert torch.equal(routing.topk_ids, best) and not torch.equal(biased.topk_ids, best)


@pytest.mark.parametrize("topk_method", TOKEN_CHOICE)
def test_a_large_bias_draws_and_a_small_one_repels(topk_method: str) -> None:
    assert chosen(route(topk_method, bias={(LAYER, 5): 100.0}))[:, 5].all()
    assert not chosen(route(topk_method, bias={(LAYER, 5): -100.0}))[:, 5].any()
    assert torch.equal(
        chosen(route(topk_method, bias={(LAYER - 1, 5): 100.0})), chosen(route(topk_method))
    )


def test_noise_follows_from_seed_layer_and_token_alone() -> None:
    config = config_of("greedy")
    gate = router_of(config)
    router = SteeredRouter(config, gate, LAYER, Steering(noise=0.5, noise_seed=3))
    hidden_states, input_ids = text(4000, 0)
    with torch.inference_mode():
        whole = router(hidden_states, input_ids)
        apart = [router(hidden_states[i : i + 1], input_ids[i : i + 1]) for i in range(40)]
        plain = gate(hidden_states, input_ids)
    noise = whole.router_logits - plain.router_logits
    torch.testing.assert_close(
        torch.cat([r.router_logits for r in apart]), whole.router_logits[:40]
    )
    per_id = torch.stack([noise[input_ids == token_id][0] for token_id in input_ids.unique()])
    assert abs(float(per_id.std()) - 0.5) < 0.05 and abs(float(per_id.mean())) < 0.08
    other_seed = SteeredRouter(config, gate, LAYER, Steering(noise=0.5, noise_seed=4))
    other_layer = SteeredRouter(config, gate, 1, Steering(noise=0.5, noise_seed=3))
    for other in (other_seed, other_layer):
        assert not torch.equal(other(hidden_states, input_ids).topk_ids, whole.topk_ids)


# --- in a whole model ----------------------------------------------------------------------------


def test_no_change_is_the_model_itself(model: Model) -> None:
    assert steered(model.network, Steering()) is model.network
    assert steered(model.network, Steering(bias={(1, 2): 0.0})) is model.network


def test_weights_are_shared_and_the_model_stays_as_it_is(model: Model) -> None:
    ids = torch.arange(20)[None]
    before = model.logits(ids)
    copied = steered(model.network, Steering(disabled={(1, 0), (1, 1)}))
    ours, theirs = dict(model.network.named_parameters()), dict(copied.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[n] is theirs[n] for n in ours)
    assert copied.config is model.config
    assert copied.model.layers[0] is model.network.model.layers[0]
    assert copied.model.layers[2] is model.network.model.layers[2]  # no change in this layer
    assert not torch.equal(copied.logits(copied(ids)), before)
    assert torch.equal(model.logits(ids), before)
    assert not any(isinstance(m, SteeredRouter) for m in model.network.modules())


def test_further_token_prediction_keeps_its_router(model: Model) -> None:
    network = CausalLM(model.config.model_copy(update={"num_nextn_predict_layers": 1}))
    initialise(network, 0)
    copied = steered(network, Steering(num_experts_per_tok=1))
    assert copied.mtp is network.mtp
    assert list(moe_layers(copied)) == [1, 2]
    assert all(isinstance(moe.gate, SteeredRouter) for moe in moe_layers(copied).values())


@pytest.mark.parametrize("changes", [{"noise": 0.3}, {"rule": "softmax"}, {"forced": {(2, 7)}}])
def test_a_steered_model_continues_as_it_reads(model: Model, changes: dict[str, Any]) -> None:
    steered_model = Model("steered", steered(model.network, Steering(**changes)), model.tokenizer)
    made = [token.id for token in steered_model.stream("the moon", max_tokens=8)]
    ids = steered_model.engine.encode("the moon") + made
    guesses = steered_model.logits(torch.tensor([ids]))[0].argmax(dim=-1)
    assert guesses[-len(made) - 1 : -1].tolist() == made


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; the model has 1 to 8"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; the model has 1 to 8"),
        ({"disabled": {(0, 1)}}, "expert 0:1 is in no layer with routed experts"),
        ({"forced": {(7, 1)}}, "expert 7:1 is in no layer with routed experts"),
        ({"bias": {(1, 8): 1.0}}, "there is no expert 8 in layer 1; its experts are 0 to 7"),
        ({"disabled": {(2, -1)}}, "there is no expert -1 in layer 2"),
        ({"disabled": {(2, e) for e in range(8)}}, "all 8 experts of layer 2 are disabled"),
        ({"disabled": {(2, 1)}, "forced": {(2, 1)}}, "expert 2:1 is both disabled and forced"),
        ({"noise": -1.0}, "noise is -1.0; it must be 0 or more"),
        ({"noise": float("nan")}, "noise is nan; it must be 0 or more"),
        ({"bias": {(1, 1): float("inf")}}, "the bias of expert 1:1 is inf"),
        ({"rule": "best"}, "rule is 'best'; choose from softmax, sigmoid, relu, random"),
    ],
)
def test_mistakes_are_sentences(model: Model, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        steered(model.network, Steering(**changes))


def test_a_steered_model_is_steered_anew_from_the_plain_one(model: Model) -> None:
    off = model.steer(disabled={(1, 0)})
    with pytest.raises(UserError, match="steered already; name all changes at once"):
        steered(off.network, Steering(num_experts_per_tok=1))
    both = moe_layers(off.steer(num_experts_per_tok=1).network)[1].gate
    assert isinstance(both, SteeredRouter) and both.disabled[0] and both.top_k == 1


def test_a_dense_model_has_no_router_to_change(model: Model) -> None:
    dense = CausalLM(model.config.model_copy(update={"n_routed_experts": None}))
    assert not any(isinstance(module, MoE) for module in dense.modules())
    with pytest.raises(UserError, match="no routed experts, so there is no router to change"):
        steered(dense, Steering(num_experts_per_tok=1))
