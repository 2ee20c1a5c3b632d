from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moescope.engine.sampling import (
    SamplingParams,
    choose,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise,
)
from moescope.errors import UserError


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
    assert torch.equal(penalise(logits, seen, penalty), expected)


def test_draws_follow_the_softmax() -> None:
    """4,000 draws of four tokens: each share within four standard deviations of its probability."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    params, draws = SamplingParams(temperature=0.7), 4000
    generator = torch.Generator().manual_seed(1)
    seen = torch.zeros(0, dtype=torch.int64)
    counts = Counter(choose(logits, seen, params, generator) for _ in range(draws))
    expected = (logits.double() / 0.7).softmax(dim=0)
    for token, probability in enumerate(expected.tolist()):
        deviation = (draws * probability * (1 - probability)) ** 0.5
        assert abs(counts[token] - draws * probability) < 4 * deviation


def test_temperature_zero_takes_the_likeliest_whatever_the_seed() -> None:
    logits = drawn_logits(50, 3)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        assert choose(logits, torch.tensor([0]), SamplingParams(), generator) == logits.argmax()


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
        ("stop", ("",)),
    ],
)
def test_a_value_without_meaning_is_named(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"{field} is .*; it must be"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
