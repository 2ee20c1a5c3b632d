"""Ablation against a loop that takes the expert out by hand, and by what must follow."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from moescope.api import Model
from moescope.errors import UserError
from moescope.model.decoder import CausalLM
from moescope.scope.ablation import Ablation, ablate
from moescope.scope.losses import document_losses
from moescope.scope.texts import encode
from moescope.text.documents import Document

DOCUMENTS = [
    *(Document(f"the moon before my bed {n}", "english") for n in range(5)),
    *(Document(f"床前明月光 {n} 是" * (n % 3 + 1), "poems") for n in range(5)),
]


@pytest.fixture(scope="module")
def found(model: Model) -> Ablation:
    return ablate("small", model.network, model.tokenizer, DOCUMENTS, layers=[2])


def nats_one_by_one(model: Model, network: CausalLM, document: Document) -> float:
    """Negative log-likelihood of a document's text, token by token, in float64."""
    ids = encode(model.tokenizer, [document])[0]
    with torch.inference_mode():
        logits = network.logits(network(torch.tensor([ids])))[0].double()
    logprobs = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    return -sum(float(logprobs[at, following]) for at, following in enumerate(ids[1:]))


def test_document_losses_are_those_of_each_document_alone(model: Model) -> None:
    found = document_losses(model.network, encode(model.tokenizer, DOCUMENTS))
    expected = [nats_one_by_one(model, model.network, document) for document in DOCUMENTS]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_document_beyond_the_context_is_read_in_windows(model: Model) -> None:
    context = model.config.max_position_embeddings
    ids = encode(model.tokenizer, [Document("the moon, is it frost? 月光 " * 20, "d")])[0]
    assert len(ids) > 2 * context
    (found,) = document_losses(model.network, [ids])
    parts = [ids[start : start + context + 1] for start in range(0, len(ids) - 1, context)]
    assert found == pytest.approx(sum(document_losses(model.network, parts)), rel=1e-5)


def test_nothing_is_scored_beyond_the_trained_length_unless_asked(model: Model) -> None:
    """A model that accepts 64 tokens but was trained on 24 at once is read in windows of 24."""
    config = model.config.model_copy(update={"trained_length": 24})
    short = CausalLM(config)
    short.load_state_dict(model.network.state_dict())
    ids = encode(model.tokenizer, [Document("the moon, is it frost? 月光 " * 20, "d")])[0]
    parts = [ids[start : start + 25] for start in range(0, len(ids) - 1, 24)]
    (found,) = document_losses(short, [ids])
    assert found == pytest.approx(sum(document_losses(model.network, parts)), rel=1e-5)
    (whole,) = document_losses(short, [ids], window=64)
    assert whole == pytest.approx(document_losses(model.network, [ids])[0], rel=1e-6)
    assert whole != pytest.approx(found, rel=1e-3)
    with pytest.raises(UserError, match=r"a window of 65 tokens is longer than .* context of 64"):
        document_losses(short, [ids], window=65)


@pytest.mark.parametrize("expert", [0, 5])
def test_the_cost_is_the_loss_without_the_expert_minus_the_loss_with_it(
    model: Model, found: Ablation, expert: int
) -> None:
    """The oracle keeps the expert from being chosen by its balancing bias."""
    network = copy.deepcopy(model.network)
    network.get_buffer("model.layers.2.mlp.gate.e_score_correction_bias")[expert] = -1e9
    for d, domain in enumerate(found.domains):
        mine = [document for document in DOCUMENTS if document.domain == domain]
        before = sum(nats_one_by_one(model, model.network, document) for document in mine)
        after = sum(nats_one_by_one(model, network, document) for document in mine)
        cost = (after - before) / found.tokens[d]
        assert found.cost[d][0][expert] == pytest.approx(cost, rel=1e-2, abs=1e-6)
        assert found.loss[d] == pytest.approx(before / found.tokens[d], rel=1e-3)
        assert found.low[d][0][expert] <= found.cost[d][0][expert] <= found.high[d][0][expert]


def test_an_expert_that_nobody_chooses_costs_nothing(model: Model) -> None:
    network = copy.deepcopy(model.network)
    network.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")[3] = -1e9
    found = ablate("small", network, model.tokenizer, DOCUMENTS, layers=[1])
    for d in range(2):
        assert np.array([found.cost[d][0][3], found.low[d][0][3], found.high[d][0][3]]) == (
            pytest.approx(0, abs=1e-6)
        )
        assert max(map(abs, found.cost[d][0])) > 1e-4


def test_forcing_is_told_apart_and_differs(model: Model, found: Ablation) -> None:
    forced = ablate("small", model.network, model.tokenizer, DOCUMENTS, layers=[2], force=True)
    assert forced.forced
    assert not found.forced
    assert forced.loss == found.loss
    assert forced.cost != found.cost


def test_it_is_saved_in_full(found: Ablation, tmp_path: Path) -> None:
    found.save(tmp_path / "ablation.json")
    assert Ablation.from_file(tmp_path / "ablation.json") == found


def test_a_layer_without_experts_is_a_sentence(model: Model) -> None:
    with pytest.raises(UserError, match="layer 0 has no routed experts; layers that have: 1, 2"):
        ablate("small", model.network, model.tokenizer, DOCUMENTS, layers=[0])
    dense = CausalLM(model.config.model_copy(update={"first_k_dense_replace": 3}))
    with pytest.raises(UserError, match="no routed experts to switch off"):
        ablate("dense", dense, model.tokenizer, DOCUMENTS)
