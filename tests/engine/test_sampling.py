from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import moescope
from moescope.engine.sampling import (
    SHORTLIST,
    Choice,
    SamplingParams,
    Shortlist,
    choose,
    distribution,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    likeliest,
    penalised,
)
from moescope.errors import UserError
from moescope.kernels import cpu


def drawn_logits(vocab: int, seed: int) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


SHAPES = {"vocab": st.integers(1, 200), "seed": st.integers(0, 10_000)}


@given(**SHAPES, top_k=st.integers(1, 250))
def test_top_k_equals_transformers(vocab: int, seed: int, top_k: int) -> None:
    logits = drawn_logits(vocab, seed)
    expected = TopKLogitsWarper(top_k)(torch.zeros(1, 1), logits[None])[0]
    assert torch.equal(keep_top_k(logits, top_k), expected)


@given(**SHAPES, top_p=st.floats(0.01, 0.99))
def test_top_p_equals_transformers(vocab: int, seed: int, top_p: float) -> None:
    logits = drawn_logits(vocab, seed)
    expected = TopPLogitsWarper(top_p)(torch.zeros(1, 1), logits[None])[0]
    assert torch.equal(keep_top_p(logits, top_p), expected)


@given(**SHAPES, min_p=st.floats(0.0, 1.0))
def test_min_p_equals_transformers(vocab: int, seed: int, min_p: float) -> None:
    logits = drawn_logits(vocab, seed)
    expected = MinPLogitsWarper(min_p)(torch.zeros(1, 1), logits[None])[0]
    assert torch.equal(keep_min_p(logits, min_p), expected)


@given(**SHAPES, penalty=st.floats(0.5, 2.0), length=st.integers(1, 20))
def test_repetition_penalty_equals_transformers(
    vocab: int, seed: int, penalty: float, length: int
) -> None:
    logits = drawn_logits(vocab, seed)
    seen = torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen[None], logits[None].clone())[0]
    params = SamplingParams(repetition_penalty=penalty)
    assert torch.equal(penalised(logits, seen.tolist(), 0, params), expected)


@given(
    **SHAPES,
    length=st.integers(1, 20),
    made=st.integers(0, 20),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
)
def test_what_was_made_is_penalised_by_count_and_for_being_there(
    vocab: int, seed: int, length: int, made: int, frequency: float, presence: float
) -> None:
    logits = drawn_logits(vocab, seed)
    ids = torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    made = min(made, length)
    params = SamplingParams(frequency_penalty=frequency, presence_penalty=presence)
    counts = Counter(ids[length - made :])
    expected = [
        logit - counts[token] * frequency - (counts[token] > 0) * presence
        for token, logit in enumerate(logits.tolist())
    ]
    assert penalised(logits, ids, made, params).tolist() == pytest.approx(expected, abs=1e-5)


def test_draws_follow_the_softmax() -> None:
    """4,000 draws of four tokens: each share within four standard deviations of its probability."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    params, draws = SamplingParams(temperature=0.7), 4000
    generator = torch.Generator().manual_seed(1)
    counts = Counter(choose(logits, params, draw(generator)) for _ in range(draws))
    expected = (logits.double() / 0.7).softmax(dim=0)
    for token, probability in enumerate(expected.tolist()):
        deviation = (draws * probability * (1 - probability)) ** 0.5
        assert abs(counts[token] - draws * probability) < 4 * deviation


def test_temperature_zero_takes_the_likeliest_whatever_the_seed() -> None:
    logits = drawn_logits(50, 3)
    for drawn in (0.0, 0.3, 0.999):
        assert choose(logits, SamplingParams(), drawn) == logits.argmax()


@given(exponent=st.floats(-45, -3), seed=st.integers(0, 99))
def test_the_colder_the_likelier_is_the_likeliest(exponent: float, seed: int) -> None:
    params = SamplingParams(temperature=10**exponent)
    logits = drawn_logits(300, seed)
    best = logits.topk(2).values
    if params.temperature and (best[0] - best[1]) / params.temperature < 40:
        return
    assert choose(logits, params, 0.999) == logits.argmax()
    shortlist = Shortlist.of(logits[None], [params])
    assert shortlist.choose(0, params, 0.999) in (logits.argmax(), None)  # None: ask `choose`


@given(
    vocab=st.one_of(st.integers(1, 60), st.integers(65, 300)),
    seed=st.integers(0, 10_000),
    drawn=st.floats(0.0, 1.0, exclude_max=True),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 5, 64, 65, 200]),
    top_p=st.sampled_from([None, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([None, 0.0, 0.05]),
    longest=st.sampled_from([SHORTLIST, 2 * SHORTLIST]),
)
def test_a_shortlist_chooses_as_all_logits_do(
    vocab: int,
    longest: int,
    seed: int,
    drawn: float,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = drawn_logits(vocab, seed)
    rows = torch.stack([logits - 1, logits])
    shortlist = Shortlist.of(rows, [SamplingParams(), params])
    row = 1
    if longest > SHORTLIST:
        row, shortlist = 0, shortlist.of_row(1, logits, longest)
    found = shortlist.choose(row, params, drawn)
    expected = choose(logits, params, drawn)
    if found is None:
        assert vocab > longest, "all tokens are on the shortlist"
    elif found != expected:  # what was drawn lies at the border of both, but for rounding
        distribution_of = distribution(logits, params).double()
        ordered, ids = distribution_of.sort(descending=True, stable=True)
        borders = {int(i): float(c) for i, c in zip(ids, ordered.cumsum(0), strict=True)}
        likelier = found if borders[found] < borders[expected] else expected
        assert abs(borders[likelier] - drawn) < 1e-5
    assert shortlist.logprob(row, expected, logits) == pytest.approx(
        float(logits.log_softmax(-1)[expected]), abs=1e-5
    )


@given(
    vocab=st.integers(1, 1500),
    distinct=st.sampled_from([1, 2, 40, 10_000]),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_of_equal_logits_the_first_are_likeliest(
    vocab: int, distinct: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(distinct, (2, vocab), generator=generator).float()
    count = max(1, int(share * vocab))
    ids, values = likeliest(logits, count)
    ordered, expected = logits.sort(descending=True, stable=True)
    assert torch.equal(values, ordered[:, :count])
    if cpu.available():  # PyTorch's own leaves it open
        assert torch.equal(ids, expected[:, :count])


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_an_engine_that_is_sure_of_nothing_draws_from_all_that_may_come(spread: float) -> None:
    engine = moescope.load("tiny").engine
    vocab = engine.model.config.vocab_size
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * spread
    for seed in range(12):
        params = SamplingParams(temperature=1.0, top_p=0.97, seed=seed)
        text = engine.sequence([5, 6], params)
        (choice,) = engine.pick(logits[None], [text])
        assert isinstance(choice, Choice)
        drawn = draw(torch.Generator().manual_seed(seed))
        expected = choose(logits, params, drawn)
        order = logits.sort(descending=True, stable=True).indices.tolist()
        # Where sums end between two tokens is a matter of rounding.
        assert abs(order.index(choice.id) - order.index(expected)) <= 1


def test_a_shortlist_is_enough_for_the_usual_settings() -> None:
    logits = drawn_logits(5000, 0) * 2
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=40, min_p=0.05),
    ):
        shortlist = Shortlist.of(logits[None], [params])
        assert shortlist.choose(0, params, 0.5) is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("stop", ("",)),
    ],
)
def test_a_value_without_meaning_is_named(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"{field} is .*; it must be"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


@settings(max_examples=200)
@given(
    penalty=st.sampled_from([1e-45, 1e-38, 1e-5, 1.0, 100.0, 1e38]),
    temperature=st.sampled_from([1e-5, 0.1, 0.7, 1.0, 100.0, 1e30]),
    top_p=st.sampled_from([None, 1e-300, 1e-9, 0.7, 1.0]),
    top_k=st.sampled_from([None, 1, 3, 10**6]),
    min_p=st.sampled_from([None, 0.0, 0.5, 1.0]),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4]),
    drawn=st.sampled_from([0.0, 0.5, 1 - 2**-53]),
    seed=st.integers(0, 50),
)
def test_extreme_values_leave_a_token_to_pick(
    penalty: float,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    scale: float,
    drawn: float,
    seed: int,
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=penalty,
    )
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(90, generator=generator) * scale
    scores = penalised(logits, list(range(0, 90, 7)), 4, params)
    assert scores.isfinite().all()
    assert 0 <= choose(scores, params, drawn) < 90
    chosen = Shortlist.of(scores[None], [params]).choose(0, params, drawn)
    assert chosen is None or 0 <= chosen < 90
