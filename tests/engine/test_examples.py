"""Greedy text behind the page's examples and common beginnings does not go round in circles."""

import pytest

import moescope
from moescope.server.examples import examples, question_form

LONGEST, TOKENS = 24, 96


def goes_round(ids: list[int]) -> bool:
    """Whether somewhere a piece of some tokens stands three times on end, eight tokens at least."""
    for period in range(1, LONGEST + 1):
        alike = 0  # tokens on end that are the same as those a period before
        for before, now in zip(ids, ids[period:], strict=False):
            alike = alike + 1 if before == now else 0
            if alike >= max(2 * period, 8):
                return True
    return False


def test_what_goes_round_is_found() -> None:
    assert goes_round([1, 2, 3, *[4, 5, 6] * 4])
    assert goes_round([1, *[2] * 9])
    assert not goes_round([1, 2, 3, 4] * 2 + list(range(30)))
    assert not goes_round([1, 1, 1, 1, 1, 2, 2, 2, 2])


@pytest.mark.parametrize(
    "beginning", ["Once upon a time", "It is a truth universally acknowledged"]
)
def test_known_beginnings_go_on(beginning: str) -> None:
    (made,) = moescope.load("tiny").generate([beginning], max_tokens=TOKENS)
    assert not goes_round([token.id for token in made.tokens]), made.text


def test_the_pages_examples_go_on() -> None:
    model = moescope.load("tiny")
    shown = examples(question_form(model.tokenizer))
    made = model.generate([example.text for example in shown], max_tokens=TOKENS)
    for example, one in zip(shown, made, strict=True):
        assert not goes_round([token.id for token in one.tokens]), (example.label, one.text)
