"""Specialization against plain loops over a trace of each document."""

from collections import Counter
from pathlib import Path

import pytest

from moescope.api import Model
from moescope.catalog import catalog
from moescope.errors import UserError
from moescope.model.decoder import CausalLM, initialise
from moescope.scope.specialization import Specialization, specialize
from moescope.text.documents import Document

DOCUMENTS = [
    *(Document(f"the moon before my bed {n}", "english") for n in range(7)),
    *(Document(f"床前明月光 {n} 是" * (n % 3 + 1), "poems") for n in range(8)),
]


@pytest.fixture(scope="module")
def found(model: Model) -> Specialization:
    return specialize("small", model.network, model.tokenizer, DOCUMENTS)


@pytest.fixture(scope="module")
def observed(model: Model) -> list[tuple[str, int, list[list[int]]]]:
    """Domain, id and each layer's experts of every token, one document at a time."""
    rows = []
    for document in DOCUMENTS:
        trace = model.trace(document.text)
        routers = [layer.router for layer in trace.layers if layer.router]
        for place, token in enumerate(trace.tokens):
            if token.id not in model.tokenizer.special_ids:
                rows.append((document.domain, token.id, [r.topk_ids[place] for r in routers]))
    return rows


def test_load_is_each_experts_share_of_a_domains_slots(found, observed) -> None:
    assert found.domains == ["english", "poems"]
    assert found.layers == [1, 2]
    assert found.documents == [7, 8]
    for d, domain in enumerate(found.domains):
        mine = [row for row in observed if row[0] == domain]
        assert found.tokens[d] == len(mine)
        for position in range(2):
            counts = Counter(e for _, _, chosen in mine for e in chosen[position])
            expected = [counts[e] / (3 * len(mine)) for e in range(8)]
            assert found.load[d][position] == pytest.approx(expected, rel=1e-3)


def test_typical_tokens_have_their_count_and_lift(model: Model, found, observed) -> None:
    occurrences = Counter(token_id for _, token_id, _ in observed)
    for position in range(2):
        for expert in range(8):
            mine = Counter(t for _, t, chosen in observed if expert in chosen[position])
            share = sum(mine.values()) / len(observed)
            typical = found.typical[position][expert]
            assert len(typical) <= 8
            rank = {
                t: (n + 5) / (share * occurrences[t] + 5)
                for t, n in mine.items()
                if n > share * occurrences[t]
            }
            assert len(typical) == min(8, len(rank))
            ranks = [rank[token.id] for token in typical]
            assert ranks == sorted(rank.values(), reverse=True)[: len(ranks)]
            for token in typical:
                assert token.count == mine[token.id]
                expected = mine[token.id] / (share * occurrences[token.id])
                assert token.lift == pytest.approx(expected, rel=1e-3)
                assert token.text == model.tokenizer.decode([token.id])
                assert any(token.context in document.text for document in DOCUMENTS)


def test_pairs_have_their_count_and_lift(found, observed) -> None:
    for position in range(2):
        assert found.together[position]
        for pair in found.together[position]:
            left, right = (
                sum(e in chosen[position] for _, _, chosen in observed) for e in pair.experts
            )
            both = sum({*pair.experts} <= {*chosen[position]} for _, _, chosen in observed)
            assert pair.count == both
            assert pair.lift == pytest.approx(both * len(observed) / (left * right), rel=1e-3)


def test_it_is_saved_in_full(found: Specialization, tmp_path: Path) -> None:
    found.save(tmp_path / "specialization.json")
    assert Specialization.from_file(tmp_path / "specialization.json") == found
    (tmp_path / "other.json").write_text('{"step": 3, "load": {}}')
    with pytest.raises(UserError, match="this is no specialization: model"):
        Specialization.from_file(tmp_path / "other.json")


def test_progress_ends_at_all_tokens(model: Model) -> None:
    told: list[tuple[int, int]] = []
    specialize("small", model.network, model.tokenizer, DOCUMENTS, lambda *done: told.append(done))
    assert told[-1][0] == told[-1][1]


def test_experts_of_any_number_a_token(model: Model) -> None:
    """ReLU routers give tokens different numbers of experts."""
    config = model.config.model_copy(update={"topk_method": "relu"})
    network = CausalLM(config)
    initialise(network, seed=0)
    found = specialize("relu", network, model.tokenizer, DOCUMENTS)
    assert [sum(by_layer[0]) for by_layer in found.load] == pytest.approx([1, 1], abs=1e-3)


def test_a_dense_model_is_refused(model: Model) -> None:
    config = model.config.model_copy(update={"first_k_dense_replace": 3})
    with pytest.raises(UserError, match="no routed experts"):
        specialize("dense", CausalLM(config), model.tokenizer, DOCUMENTS)


def test_what_is_in_the_box_is_small_and_belongs_to_its_model() -> None:
    from moescope.catalog import BOX

    file = BOX / "tiny" / "specialization.json"
    if not file.exists():
        pytest.skip("the model in the box is not packed yet")
    assert file.stat().st_size < 600_000
    found, config = Specialization.from_file(file), catalog()["tiny"].config
    assert len(found.load[0][0]) == config.n_routed_experts
    assert found.layers == [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
