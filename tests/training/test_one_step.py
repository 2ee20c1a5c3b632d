"""One step of a training, against plain loops and the papers' formulas."""

import math
from typing import Any

import pytest
import torch
from small import ROUTER_FIELDS, Kept, next_ids
from torch import Tensor

from moescope.training.objective import BalanceRecorder, compute_losses

pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.mark.parametrize("topk_method", ["noaux_tc", "greedy", "relu"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_gradients_of_micro_batches_sum_to_those_of_the_batch(
    optimizer: str, topk_method: str, trainer
) -> None:
    """After one step momenta and first moments are the clipped gradient times a constant.

    Losses that weigh a whole batch's load are among them.
    """
    balance = {"z_loss": 0.1, "expert_aux": 1.0, "device_aux": 1.0, "device_groups": 2}
    if topk_method == "relu":
        balance = {"l1_start": 1.0, "sequence_aux": 0.0}
    ends: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    for rows_at_a_time in (1, 2, 4):
        training = {"dtype": "float32", "optimizer": optimizer, "micro_batch_size": rows_at_a_time}
        model = {"topk_method": topk_method, **ROUTER_FIELDS.get(topk_method, {})}
        made = trainer(training=training, balance=balance, model=model)
        row = made.train_step()
        ends.append((row, made.learner.optimizer.state_tensors()))
    for other_row, other_state in ends[:2]:
        assert_same_step(ends[2], (other_row, other_state))


def assert_same_step(one: tuple[dict[str, Any], dict[str, Tensor]], other: Any) -> None:
    (row, state), (other_row, other_state) = one, other
    for name in ("loss", "further_tokens_loss", "balance_loss", "gradient_norm"):
        assert row[name] == pytest.approx(other_row[name], rel=1e-5) and row[name] > 0
    assert row["max_violation"] == other_row["max_violation"]
    gradients = [n for n in state if n.startswith(("momentum.", "adamw.exp_avg."))]
    assert len(gradients) == len([n for n in state if n.startswith("master.")])
    for name in gradients:
        torch.testing.assert_close(state[name], other_state[name], atol=1e-7, rtol=1e-4, msg=name)


def test_the_bias_moves_against_the_load_of_the_step(trainer) -> None:
    made = trainer(training={"dtype": "float32"})
    kept = Kept()
    with torch.no_grad():
        made.model(next_ids(made)[:, :-1], recorder=kept)
    row = made.train_step()
    chosen = [kept.routings[1].topk_ids.flatten().tolist().count(i) for i in range(4)]
    mean = sum(chosen) / 4
    expected = [0.01 * ((mean > count) - (mean < count)) for count in chosen]
    bias = made.model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.tolist() == pytest.approx(expected) and any(expected)
    assert row["experts_per_token"]["1"] == pytest.approx(sum(chosen) / (4 * 24))
    assert row["max_violation"]["1"] == pytest.approx(max(chosen) / mean - 1)


def shares(scores: Tensor) -> Tensor:
    """Scores that sum to one for each token, as the formulas' softmax scores do."""
    return scores.detach().double() / scores.detach().double().sum(dim=1, keepdim=True)


def expert_aux(scores: Tensor, topk_ids: Tensor) -> float:
    """DeepSeekMoE, eq. 12-14, over all tokens as one sequence."""
    tokens, experts = scores.shape
    counts = [topk_ids.flatten().tolist().count(i) for i in range(experts)]
    columns = shares(scores).T.tolist()
    k = topk_ids.shape[1]
    return sum(
        experts / (k * tokens) * count * sum(column) / tokens
        for count, column in zip(counts, columns, strict=True)
    )


def sequence_aux(scores: Tensor, topk_ids: Tensor) -> float:
    """DeepSeek-V3, eq. 17-20: scores normalised for each token, one term a sequence."""
    sequences = zip(scores.split(24), topk_ids.split(24), strict=True)
    terms = [expert_aux(part, ids) for part, ids in sequences]
    return sum(terms) / len(terms)


def device_aux(scores: Tensor, topk_ids: Tensor) -> float:
    """DeepSeekMoE, eq. 15-17, with two devices of two experts."""
    tokens, experts = scores.shape
    k, loss = topk_ids.shape[1], 0.0
    for device in ([0, 1], [2, 3]):
        counts = [topk_ids.flatten().tolist().count(i) for i in device]
        load = sum(experts / (k * tokens) * count for count in counts) / len(device)
        loss += load * sum(float(shares(scores)[:, i].sum()) / tokens for i in device)
    return loss


def z_loss(logits: Tensor) -> float:
    """ST-MoE, eq. 5."""
    sums = [math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits.double().tolist()]
    return sum(sums) / len(sums)


def l1(scores: Tensor, topk_ids: Tensor) -> float:
    """ReMoE: outputs of busy experts weigh more."""
    tokens, experts = scores.shape
    counts = [topk_ids.flatten().tolist().count(i) for i in range(experts)]
    return sum(
        experts / (2 * tokens) * count * float(scores[:, i].detach().double().sum()) / tokens
        for i, count in enumerate(counts)
    )


@pytest.mark.parametrize(
    ("balance", "model", "term"),
    [
        ({"expert_aux": 0.1}, {}, lambda r: 0.1 * expert_aux(r.scores, r.topk_ids)),
        ({"sequence_aux": 0.2}, {}, lambda r: 0.2 * sequence_aux(r.scores, r.topk_ids)),
        (
            {"device_aux": 0.3, "device_groups": 2},
            {},
            lambda r: 0.3 * device_aux(r.scores, r.topk_ids),
        ),
        ({"z_loss": 0.4}, {}, lambda r: 0.4 * z_loss(r.router_logits)),
        (
            {"l1_start": 0.5},
            {"topk_method": "relu"},
            lambda r: 0.5 / 2 * l1(r.scores, r.topk_ids),
        ),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_a_balance_term_is_its_formula_summed_over_layers(
    balance: dict[str, float], model: dict[str, str], term, trainer
) -> None:
    made = trainer(
        model={"first_k_dense_replace": 0, "num_nextn_predict_layers": 0, **model},
        balance={"sequence_aux": 0.0, **balance},
        training={"dtype": "float32"},
    )
    ids, kept = next_ids(made), Kept()
    config = made.config
    recorder = BalanceRecorder(
        config.model, config.balance, rows=len(ids), l1_weight=made.learner.l1.weight
    )
    losses = compute_losses(made.model, ids, recorder, 0.3)
    made.model(ids[:, :-1], recorder=kept)
    assert list(kept.routings) == [0, 1]
    expected = sum(term(routing) for routing in kept.routings.values())
    assert float(losses.balance.detach()) == pytest.approx(expected, rel=1e-5)
    assert expected > 1e-3
    whole = losses.next_token + 0.3 * losses.further_tokens + losses.balance
    assert losses.total.item() == pytest.approx(whole.item())


def test_a_prediction_depths_experts_are_balanced_too(trainer) -> None:
    made = trainer(model={"num_nextn_predict_layers": 1})
    layers = made.config.model.num_hidden_layers
    gate = made.model.mtp.depths[0].layer.mlp.gate
    row = made.train_step()
    assert str(layers) in row["max_violation"]
    speed = made.config.balance.bias_update_speed
    moved = gate.e_score_correction_bias.abs().tolist()
    assert all(size == pytest.approx(speed) for size in moved if size)
    assert any(moved)


def test_further_tokens_are_predicted_by_later_depths(trainer) -> None:
    """DeepSeek-V3, eq. 21-25: depth d joins the token d ahead and predicts the one after it."""
    made = trainer(training={"dtype": "float32"}, model={"num_nextn_predict_layers": 2})
    config, network = made.config, made.model
    ids = next_ids(made)  # (4, 25)
    recorder = BalanceRecorder(config.model, config.balance, rows=len(ids), l1_weight=0.0)
    losses = compute_losses(network, ids, recorder, 0.3)
    hidden, means = network(ids[:, :-1]).detach(), []  # (4, 24, hidden)
    for ahead, depth in ((1, network.mtp.depths[0]), (2, network.mtp.depths[1])):
        hidden = hidden[:, : 24 - ahead]
        joined = ids[:, ahead:24]
        positions = torch.arange(24 - ahead).expand(4, -1)
        rotation = network.model.rotary_emb(positions, hidden.dtype)
        embedded = network.model.embed_tokens(joined)
        hidden = depth(hidden, embedded, joined, rotation, positions)
        log_probs = network.logits(depth.norm(hidden)).detach().double().log_softmax(-1)
        nats = [
            -float(log_probs[row, i, ids[row, i + ahead + 1]])
            for row in range(4)
            for i in range(24 - ahead)
        ]
        means.append(sum(nats) / len(nats))
    assert float(losses.further_tokens) == pytest.approx(sum(means) / 2, rel=1e-5)
