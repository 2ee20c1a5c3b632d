import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moescope.config import ModelConfig
from moescope.model import balancing
from moescope.model.routing import UNUSED, NoAuxTopK

SHAPES = st.tuples(
    st.integers(1, 3),  # sequences
    st.integers(1, 6),  # tokens of a sequence
    st.integers(2, 4),  # groups
    st.integers(1, 3),  # experts of a group
    st.integers(0, 2**31),  # seed
)


def draw(shape: tuple[int, int, int, int, int]) -> tuple[Tensor, Tensor, int]:
    """Scores in (0, 1), a choice with some unused slots, and k."""
    sequences, seq, groups, size, seed = shape
    experts = groups * size
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(sequences * seq, experts, generator=generator) * 0.9 + 0.05
    top_k = 1 + seed % experts
    return scores, scores.topk(top_k, dim=-1).indices, top_k


def chosen(topk_ids: Tensor, token: int, expert: int) -> int:
    return int(expert in topk_ids[token].tolist())


@given(SHAPES)
def test_expert_level_loss_is_equations_12_to_14(shape):
    scores, topk_ids, top_k = draw(shape)
    tokens, experts = scores.shape
    expected = 0.0
    for i in range(experts):
        f = experts / (top_k * tokens) * sum(chosen(topk_ids, t, i) for t in range(tokens))
        p = sum(float(scores[t, i] / scores[t].sum()) for t in range(tokens)) / tokens
        expected += f * p
    assert float(balancing.expert_level_loss(scores, topk_ids)) == pytest.approx(expected, rel=1e-5)


@given(SHAPES)
def test_device_level_loss_is_equations_15_to_17(shape):
    scores, topk_ids, top_k = draw(shape)
    groups, (tokens, experts) = shape[2], scores.shape
    expected = 0.0
    for group in range(groups):
        members = range(group * experts // groups, (group + 1) * experts // groups)
        f, p = 0.0, 0.0
        for j in members:
            f += experts / (top_k * tokens) * sum(chosen(topk_ids, t, j) for t in range(tokens))
            p += sum(float(scores[t, j] / scores[t].sum()) for t in range(tokens)) / tokens
        expected += f / len(members) * p
    loss = balancing.device_level_loss(scores, topk_ids, groups)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@given(SHAPES)
def test_sequence_wise_loss_is_equations_17_to_20_averaged_over_sequences(shape):
    scores, topk_ids, top_k = draw(shape)
    sequences, seq, experts = shape[0], shape[1], scores.shape[1]
    expected = 0.0
    for s in range(sequences):
        span = range(s * seq, (s + 1) * seq)
        for i in range(experts):
            f = experts / (top_k * seq) * sum(chosen(topk_ids, t, i) for t in span)
            p = sum(float(scores[t, i] / scores[t].sum()) for t in span) / seq
            expected += f * p / sequences
    loss = balancing.sequence_wise_loss(scores, topk_ids, seq)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@given(SHAPES)
def test_load_balanced_l1_weighs_each_output_by_its_experts_load(shape):
    scores, topk_ids, top_k = draw(shape)
    tokens, experts = scores.shape
    expected = 0.0
    for e in range(experts):
        f = experts / (top_k * tokens) * sum(chosen(topk_ids, t, e) for t in range(tokens))
        expected += sum(f * float(scores[t, e]) for t in range(tokens)) / tokens
    loss = balancing.load_balanced_l1(scores, topk_ids, top_k)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@given(SHAPES)
def test_z_loss_is_the_mean_squared_log_partition(shape):
    logits = draw(shape)[0] * 8 - 4
    expected = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits.tolist())
    loss = balancing.router_z_loss(logits)
    assert float(loss) == pytest.approx(expected / len(logits), rel=1e-4)


@given(SHAPES, st.sampled_from(["expert", "device", "sequence", "l1"]))
def test_the_gradient_flows_through_the_scores_and_not_through_the_load(shape, kind):
    scores, topk_ids, top_k = draw(shape)
    scores.requires_grad_(True)
    losses = {
        "expert": lambda s: balancing.expert_level_loss(s, topk_ids),
        "device": lambda s: balancing.device_level_loss(s, topk_ids, shape[2]),
        "sequence": lambda s: balancing.sequence_wise_loss(s, topk_ids, shape[1]),
        "l1": lambda s: balancing.load_balanced_l1(s, topk_ids, top_k),
    }
    (gradient,) = torch.autograd.grad(losses[kind](scores), scores)
    # With the choice fixed the loss is smooth, so a small step shows the same slope.
    direction = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)).double()
    base = scores.detach().double()
    ahead, behind = (losses[kind](base + sign * 1e-5 * direction) for sign in (1, -1))
    slope = float((gradient * direction).sum())
    assert slope == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-3, abs=1e-4)


def test_expert_level_loss_is_least_when_the_load_is_even():
    even = torch.tensor([[0.7, 0.3], [0.3, 0.7]])
    skewed = torch.tensor([[0.7, 0.3], [0.7, 0.3]])
    loss_even = balancing.expert_level_loss(even, even.topk(1).indices)
    assert float(loss_even) == pytest.approx(1.0)
    assert float(balancing.expert_level_loss(skewed, skewed.topk(1).indices)) == pytest.approx(1.4)


@given(SHAPES)
def test_no_loss_falls_when_all_scores_shrink_together(shape):
    scores, topk_ids, _ = draw(shape)
    for loss in (
        balancing.expert_level_loss,
        lambda s, ids: balancing.device_level_loss(s, ids, shape[2]),
        lambda s, ids: balancing.sequence_wise_loss(s, ids, shape[1]),
    ):
        assert float(loss(scores / 16, topk_ids)) == pytest.approx(float(loss(scores, topk_ids)))


def test_unused_slots_count_for_no_expert():
    topk_ids = torch.tensor([[2, UNUSED], [0, 2]])
    expected = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    assert torch.equal(balancing.chosen_experts(topk_ids, 3), expected)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=16), st.floats(1e-4, 0.1))
def test_the_bias_moves_by_one_step_against_the_load(counts, speed):
    bias = torch.zeros(len(counts))
    balancing.update_bias(bias, torch.tensor(counts), speed)
    mean = sum(counts) / len(counts)
    for moved, count in zip(bias.tolist(), counts, strict=True):
        if abs(count - mean) > 1e-3 * max(counts):
            assert moved == pytest.approx(speed if count < mean else -speed)


def router(experts: int = 16, top_k: int = 2) -> NoAuxTopK:
    config = ModelConfig(
        model_type="deepseek_v3",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=8,
        topk_method="noaux_tc",
        n_group=1,
        topk_group=1,
        scoring_func="sigmoid",
    )
    return NoAuxTopK(config)


def test_the_loss_free_bias_evens_out_a_skewed_router():
    gate = router()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator))
    hidden_states = torch.randn(512, 8, generator=generator) + 1.0  # far from even
    ids = torch.zeros(512, dtype=torch.int64)
    before = balancing.max_violation(gate(hidden_states, ids).expert_counts)
    for _ in range(1500):
        counts = gate(hidden_states, ids).expert_counts
        balancing.update_bias(gate.e_score_correction_bias, counts, 0.001)
    after = balancing.max_violation(gate(hidden_states, ids).expert_counts)
    assert before > 2
    assert after < 0.3


def test_adaptive_l1_holds_the_wanted_number_of_experts():
    """A ReLU router's logits, pulled up by a constant gain, are held at k experts a token."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(256, 16, generator=generator).requires_grad_(True)
    l1 = balancing.AdaptiveL1(weight=1e-8, factor=1.2)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    used: list[float] = []
    for _ in range(600):
        scores = logits.relu()
        topk_ids = torch.where(scores > 0, torch.arange(16), UNUSED)
        gain = -logits.sigmoid().sum(dim=1).mean()
        loss = gain + l1.weight * balancing.load_balanced_l1(scores, topk_ids, 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        used.append(float((scores > 0).float().sum(dim=1).mean()))
        l1.update(used[-1], 4)
    assert used[0] > 7
    assert sum(used[-100:]) / 100 == pytest.approx(4, abs=1.5)


def test_the_l1_weight_follows_the_sign_of_the_error():
    l1 = balancing.AdaptiveL1(weight=1.0, factor=1.2)
    l1.update(5.0, 4)
    assert l1.weight == pytest.approx(1.2)
    l1.update(3.9, 4)
    l1.update(3.9, 4)
    assert l1.weight == pytest.approx(1 / 1.2)
    before = l1.weight
    l1.update(4.0, 4)
    assert l1.weight == before


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=64).filter(any))
def test_measures_stay_in_their_bounds(counts):
    load = torch.tensor(counts)
    assert balancing.relative_load(load).mean() == pytest.approx(1, rel=1e-5)
    assert -1e-5 <= balancing.max_violation(load) <= len(counts) - 1 + 1e-4
    assert 0 <= balancing.load_entropy(load) <= 1 + 1e-6
    assert float(balancing.dead_share(load)) == pytest.approx(counts.count(0) / len(counts))


@pytest.mark.parametrize(
    ("counts", "violation", "entropy", "dead"),
    [([5, 5, 5, 5], 0.0, 1.0, 0.0), ([8, 0, 0, 0], 3.0, 0.0, 0.75), ([4, 4, 0, 0], 1.0, 0.5, 0.5)],
)
def test_measures_of_known_loads(counts, violation, entropy, dead):
    load = torch.tensor(counts)
    assert float(balancing.max_violation(load)) == pytest.approx(violation)
    assert float(balancing.load_entropy(load)) == pytest.approx(entropy)
    assert float(balancing.dead_share(load)) == pytest.approx(dead)
