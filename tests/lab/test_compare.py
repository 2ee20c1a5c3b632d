"""Comparisons: bits per byte by hand, pairing, turns, and what a model must not say."""

import math
from pathlib import Path

import pytest
from scipy import stats

from moescope.api import Model
from moescope.errors import UserError
from moescope.lab import compare as module
from moescope.lab.compare import Comparison, Entrant, Spread, compare
from moescope.model.decoder import CausalLM, initialise
from moescope.text.documents import Document

DOCUMENTS = [
    *(Document(f"the moon before my bed {n}", "english") for n in range(6)),
    *(Document(f"床前明月光 {n} 是" * (n % 3 + 1), "poems") for n in range(9)),
]


@pytest.fixture(scope="module")
def entrants(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[Entrant]:
    """The small model, a sibling with other weights, and a dense one."""
    made: list[Entrant] = []
    dense = {"n_routed_experts": None, "first_k_dense_replace": 3, "model_type": "deepseek_v3"}
    for name, seed, fields in (("one", 0, {}), ("other", 1, {}), ("dense", 0, dense)):
        network = CausalLM(model.config.model_copy(update=fields))
        initialise(network, seed)
        folder: Path = tmp_path_factory.mktemp(name)
        opened = Model(name, network, model.tokenizer)
        opened.save(folder)
        made.append(Entrant(name, folder, opened.engine))
    return made


@pytest.fixture(scope="module")
def found(entrants: list[Entrant]) -> Comparison:
    return compare(entrants, DOCUMENTS, rounds=3, progress=lambda _: None)


def bits_in_loops(entrant: Entrant, document: Document) -> float:
    """-log2 p(text), from the tokens' log-probabilities one at a time."""
    import torch

    ids = entrant.engine.encode(document.text)
    with torch.inference_mode():
        logits = entrant.engine.model.logits(entrant.engine.model(torch.tensor([ids])))[0].double()
    return -sum(
        float(logits[at, token] - logits[at].logsumexp(0)) / math.log(2)
        for at, token in enumerate(ids[1:])
    )


def test_bits_per_byte_are_the_texts_bits_over_its_utf8_bytes(
    entrants: list[Entrant], found: Comparison
) -> None:
    for entrant, result in zip(entrants, found.results, strict=True):
        for domain in ("english", "poems"):
            mine = [document for document in DOCUMENTS if document.domain == domain]
            size = sum(len(document.text.encode()) for document in mine)
            bits = sum(bits_in_loops(entrant, document) for document in mine)
            quality = result.quality[domain]
            assert quality.bits_per_byte.value == pytest.approx(bits / size, rel=1e-5)
            tokens = sum(len(entrant.engine.encode(document.text)) - 1 for document in mine)
            assert quality.loss.value == pytest.approx(bits * math.log(2) / tokens, rel=1e-5)
            assert quality.loss.low < quality.loss.value < quality.loss.high


def test_differences_are_paired_with_the_first(found: Comparison) -> None:
    first, other, _ = found.results
    difference = found.differences[0]
    assert [d.name for d in found.differences] == ["other", "dense"]
    for domain, interval in difference.bits_per_byte.items():
        ours, theirs = other.quality[domain].bits_per_byte, first.quality[domain].bits_per_byte
        assert interval.value == pytest.approx(ours.value - theirs.value)
        assert interval.low <= interval.value <= interval.high


def test_a_model_against_itself_differs_by_nothing(entrants: list[Entrant]) -> None:
    one = entrants[0]
    twin = Entrant("twin", one.folder, one.engine)
    found = compare([one, twin], DOCUMENTS, rounds=1, progress=lambda _: None)
    overall = found.differences[0].overall
    assert (overall.value, overall.low, overall.high) == (0, 0, 0)
    assert not overall.is_certain


def test_costs_are_those_of_the_plan_in_the_type_that_is_held(
    model: Model, found: Comparison
) -> None:
    first, _, dense = found.results
    weights = sum(parameter.numel() for parameter in model.network.parameters())
    assert (first.dtype, first.total_parameters) == ("float32", weights)
    assert first.weight_bytes == 4 * weights
    one_expert = 3 * 32 * 16
    assert first.active_parameters == weights - 2 * (8 - 3) * one_expert
    assert dense.active_parameters == dense.total_parameters
    assert first.context == 64
    assert first.cache_bytes_per_token == (16 + 4) * 2 * 3


def test_models_are_timed_in_turns_with_what_is_left_of_the_context(
    entrants: list[Entrant], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def stopwatch(engine: object, prompt: str) -> tuple[float, float, float]:
        name = next(entrant.name for entrant in entrants if entrant.engine is engine)
        seen.append(name)
        assert len(entrants[0].engine.encode(prompt)) + module.NEW_TOKENS <= 64
        return float(len(seen)), 2.0 * len(seen), 0.5 * len(seen)

    monkeypatch.setattr(module, "_time", stopwatch)
    found = compare(entrants[:2], DOCUMENTS, rounds=3, progress=lambda _: None)
    assert seen == ["one", "other", "other", "one", "one", "other", "other", "one"]
    assert found.results[0].time_to_first_token == Spread(5.0, 4.0, 8.0)
    assert found.results[0].joules_per_token == Spread(2.5, 2.0, 4.0)
    assert found.differences[0].time_per_token == Spread(
        median=pytest.approx(7 / 8), least=pytest.approx(3 / 4), most=pytest.approx(6 / 5)
    )


def test_generation_goes_on_beyond_an_end_token(entrants: list[Entrant]) -> None:
    """A model that says "end" at once is timed over as many tokens as the others."""
    engine = entrants[0].engine
    before = set(engine.end_ids)
    engine.end_ids |= set(range(300))
    try:
        first, further, _ = module._time(engine, "the moon")
        assert engine.end_ids == before | set(range(300))
    finally:
        engine.end_ids = before
    assert first > 0
    assert further > 0


def test_it_is_saved_in_full(found: Comparison, tmp_path: Path) -> None:
    found.save(tmp_path / "comparison.json")
    assert Comparison.from_file(tmp_path / "comparison.json") == found


def test_a_model_named_twice_is_a_sentence(entrants: list[Entrant]) -> None:
    with pytest.raises(UserError, match="one is named twice"):
        compare([entrants[0], entrants[0]], DOCUMENTS, rounds=1, progress=lambda _: None)


def test_other_seeds_tell_how_sure_a_difference_of_recipes_is(entrants: list[Entrant]) -> None:
    """Three seeds of either; each seed's difference is that of two comparisons of models."""
    one, other, dense = (entrant.engine for entrant in entrants)
    pair = [
        Entrant("a", entrants[0].folder, one, [other, dense]),
        Entrant("b", entrants[1].folder, dense, [one, other]),
    ]
    found = compare(pair, DOCUMENTS, rounds=1, progress=lambda _: None)
    alone = compare(entrants, DOCUMENTS, rounds=1, progress=lambda _: None)
    bits = [result.overall.bits_per_byte.value for result in alone.results]
    a, b = found.results
    assert a.bits_of_seeds == pytest.approx(bits)
    assert b.bits_of_seeds == pytest.approx([bits[2], bits[0], bits[1]])
    differences = [bits[2] - bits[0], bits[0] - bits[1], bits[1] - bits[2]]
    interval = stats.t.interval(0.95, 2, loc=sum(differences) / 3, scale=stats.sem(differences))
    over_seeds = found.differences[0].over_seeds
    assert over_seeds is not None
    assert (over_seeds.low, over_seeds.high) == pytest.approx(interval)
    assert alone.differences[0].over_seeds is None


def test_memory_holds_the_weights_and_a_full_cache(found: Comparison) -> None:
    for result in found.results:
        cache = result.cache_bytes_per_token * result.context
        assert result.memory_bytes == result.weight_bytes + cache
