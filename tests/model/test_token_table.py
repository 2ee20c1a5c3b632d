"""Routers whose experts a table gives, unsteered and steered (unsteered also in `test_parity`)."""

import torch
from hypothesis import given, strategies as st

from moescope.config import ModelConfig
from moescope.model.routing import UNUSED, TokenTable
from moescope.model.steering import SteeredRouter, Steering

HIDDEN, VOCAB, EXPERTS, LAYER = 8, 50, 9, 1


def config(top_k: int) -> ModelConfig:
    return ModelConfig(
        model_type="deepseek_v4",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=4,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=top_k,
        num_hash_layers=2,
        scoring_func="sqrtsoftplus",
        topk_method="noaux_tc",
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
    )


def gate(top_k: int) -> TokenTable:
    generator = torch.Generator().manual_seed(3)
    made = TokenTable(config(top_k)).eval().requires_grad_(False)
    made.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=generator))
    made.tid2eid.copy_(torch.rand(VOCAB, EXPERTS, generator=generator).topk(top_k).indices)
    return made


def text(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(17, HIDDEN, generator=generator), torch.randint(
        VOCAB, (17,), generator=generator
    )


@given(st.integers(1, EXPERTS), st.integers(0, 99))
def test_the_table_chooses_and_scores_weigh(top_k: int, seed: int) -> None:
    router, (states, ids) = gate(top_k), text(seed)
    routing = router(states, ids)
    assert torch.equal(routing.topk_ids, router.tid2eid[ids])
    for token, chosen in enumerate(routing.topk_ids):
        scores = torch.log1p((router.weight @ states[token]).double().exp()).sqrt()[chosen]
        expected = (1.5 * scores / scores.sum()).float()
        torch.testing.assert_close(routing.topk_weights[token], expected)


@given(st.integers(1, 4), st.integers(1, EXPERTS), st.integers(0, 99))
def test_another_number_of_experts_goes_on_by_score(top_k: int, wanted: int, seed: int) -> None:
    router, (states, ids) = gate(top_k), text(seed)
    steered = SteeredRouter(
        config(top_k), router, LAYER, Steering(num_experts_per_tok=wanted, bias={(LAYER, 0): 0.0})
    )
    routing = steered(states, ids)
    for token, chosen in enumerate(routing.topk_ids.tolist()):
        table = router.tid2eid[ids[token]].tolist()
        by_score = routing.scores[token].argsort(descending=True).tolist()
        order = table + [expert for expert in by_score if expert not in table]
        assert chosen == order[:wanted]


def test_disabled_and_forced_experts_take_precedence_over_the_table() -> None:
    router, (states, ids) = gate(3), text(1)
    steering = Steering(disabled=[(LAYER, 2)], forced=[(LAYER, 5)])
    routing = SteeredRouter(config(3), router, LAYER, steering)(states, ids)
    assert UNUSED not in routing.topk_ids
    for token, chosen in enumerate(routing.topk_ids.tolist()):
        table = [expert for expert in router.tid2eid[ids[token]].tolist() if expert not in (2, 5)]
        assert 2 not in chosen and 5 in chosen
        assert set(table[:2]) <= set(chosen)
