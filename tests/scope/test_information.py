"""Measures of information against loops over their definitions, and against chance."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from moescope.scope.information import explained_by_token, jackknife, mutual_information

tables = st.integers(2, 4).flatmap(
    lambda columns: st.lists(
        st.lists(st.integers(0, 50), min_size=columns, max_size=columns).filter(any),
        min_size=2,
        max_size=4,
    )
)


def information_in_loops(table: list[list[int]]) -> float:
    """I(X; Y) = sum p(x, y) log2 p(x, y) / p(x) p(y), with p(x) even over the rows."""
    joint = [[count / sum(row) / len(table) for count in row] for row in table]
    columns = [sum(row[j] for row in joint) for j in range(len(table[0]))]
    return sum(
        p * math.log2(p * len(table) / columns[j])
        for row in joint
        for j, p in enumerate(row)
        if p > 0
    )


@given(tables)
def test_mutual_information_is_its_definition(table: list[list[int]]) -> None:
    assert float(mutual_information(np.array(table))) == pytest.approx(
        information_in_loops(table), abs=1e-12
    )


def test_experts_of_their_own_tell_everything_and_shared_ones_nothing() -> None:
    own = np.array([[9, 0, 0], [0, 2, 0], [0, 0, 5]])
    assert float(mutual_information(own)) == pytest.approx(math.log2(3))
    assert float(mutual_information(np.array([[2, 4], [4, 8]]))) == pytest.approx(0)


def test_the_jackknife_takes_away_what_chance_adds() -> None:
    """Two groups that draw from one distribution: the plain estimate is biased, this one is not."""
    rng = np.random.default_rng(0)
    plain, corrected, errors = [], [], []
    for _ in range(200):
        blocks = [rng.multinomial(10, [1 / 16] * 16, size=20) for _ in range(2)]
        estimate, error = jackknife(blocks)
        plain.append(float(mutual_information(np.stack([b.sum(axis=0) for b in blocks]))))
        corrected.append(float(estimate))
        errors.append(float(error))
    assert np.mean(plain) > 0.02
    assert abs(np.mean(corrected)) < 0.002
    assert 1 < np.mean(errors) / np.std(corrected) < 2  # at its smallest value it is cautious


def test_the_error_is_that_of_repeated_samples() -> None:
    rng = np.random.default_rng(1)
    found = [
        jackknife(
            [
                rng.multinomial(50, [0.5, 0.3, 0.1, 0.1], size=20),
                rng.multinomial(50, [0.1, 0.1, 0.3, 0.5], size=20),
            ]
        )
        for _ in range(200)
    ]
    errors = np.array([error for _, error in found])
    assert errors.mean() == pytest.approx(np.std([estimate for estimate, _ in found]), rel=0.15)


def test_one_block_alone_corrects_nothing() -> None:
    blocks = [np.array([[5, 1]]), np.array([[1, 5]])]
    estimate, error = jackknife(blocks)
    assert float(estimate) == pytest.approx(information_in_loops([[5, 1], [1, 5]]))
    assert float(error) == 0


def explained_in_loops(token_ids: list[int], document: list[int], chosen: list[set[int]]) -> float:
    """One minus variance within tokens over variance, each a mean over pairs of occurrences."""
    places = range(len(token_ids))
    apart = [p for p in itertools.permutations(places, 2) if document[p[0]] != document[p[1]]]
    same = {t: [p for p in apart if token_ids[p[0]] == token_ids[p[1]] == t] for t in token_ids}
    eligible = [i for i in places if same[token_ids[i]]]
    if not eligible:
        return 0.0

    def distance(pairs: list[tuple[int, int]]) -> float:
        size = np.mean([len(chosen[i]) for i in eligible])
        return float(size - np.mean([len(chosen[i] & chosen[j]) for i, j in pairs]))

    size = np.mean([len(chosen[i]) for i in eligible])
    within = np.mean([distance(same[token_ids[i]]) for i in eligible])
    among = distance([p for p in apart if p[0] in eligible and p[1] in eligible])
    assert size >= 0
    return 1 - within / among if among > 0 else 0.0


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.sets(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=14,
    )
)
def test_what_the_token_explains_is_its_definition(
    rows: list[tuple[int, int, set[int]]],
) -> None:
    rows = sorted(rows, key=lambda row: row[1])
    tokens, documents, chosen = (list(column) for column in zip(*rows, strict=True))
    topk_ids = np.array([sorted(c) + [-1] * (3 - len(c)) for c in chosen], dtype=np.int32)
    found = explained_by_token(np.array(tokens), np.array(documents), topk_ids)
    assert found == pytest.approx(explained_in_loops(tokens, documents, chosen), abs=1e-9)


def test_a_fixed_table_explains_everything_and_dice_nothing() -> None:
    rng = np.random.default_rng(0)
    token_ids, document = rng.integers(0, 30, 3000), np.arange(3000) // 10
    table = np.argsort(rng.random((30, 8)), axis=1)[:, :2].astype(np.int32)
    dice = np.argsort(rng.random((3000, 8)), axis=1)[:, :2].astype(np.int32)
    assert explained_by_token(token_ids, document, table[token_ids]) == pytest.approx(1)
    assert abs(explained_by_token(token_ids, document, dice)) < 0.01
