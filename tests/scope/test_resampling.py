"""Bootstrap intervals against scipy's, and their coverage."""

import numpy as np
import pytest
from scipy import stats

from moescope.scope.resampling import mean_of_groups, rate_interval, rate_intervals


def test_it_agrees_with_scipys_bootstrap() -> None:
    rng = np.random.default_rng(5)
    sizes = rng.integers(20, 400, 60)
    amounts = sizes * rng.normal(0.02, 0.05, 60)
    theirs = stats.bootstrap(
        (amounts, sizes),
        lambda a, s, axis: a.sum(axis=axis) / s.sum(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    ours = rate_interval(amounts, sizes)
    assert ours.value == pytest.approx(amounts.sum() / sizes.sum())
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_about_95_of_100_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        sizes = rng.integers(50, 150, 40)
        found = rate_interval(sizes * rng.normal(0.1, 0.3, 40), sizes)
        held += found.low <= 0.1 <= found.high
    assert 0.90 <= held / 300 <= 0.98


def test_many_numbers_at_once_are_the_same_as_one_by_one() -> None:
    rng = np.random.default_rng(1)
    amounts, sizes = rng.normal(size=(30, 2, 3)), rng.integers(1, 9, 30)
    value, low, high = rate_intervals(amounts, sizes)
    assert value.shape == (2, 3)
    one = rate_interval(amounts[:, 1, 2], sizes)
    assert (one.value, one.low, one.high) == pytest.approx((value[1, 2], low[1, 2], high[1, 2]))


def test_certain_is_what_leaves_zero_out() -> None:
    sizes = np.full(40, 10)
    same_sign = np.linspace(0.5, 1.5, 40)
    assert rate_interval(same_sign, sizes).is_certain
    assert rate_interval(-same_sign, sizes).is_certain
    assert not rate_interval(same_sign - same_sign.mean(), sizes).is_certain


def test_groups_count_alike_and_one_alone_is_scipys() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.normal(0.2, 1, 25), rng.normal(0.4, 2, 400)
    low, high = stats.norm.interval(0.95, loc=one.mean(), scale=stats.sem(one))
    alone = mean_of_groups([one])
    assert (alone.low, alone.high) == pytest.approx((low, high))
    both = mean_of_groups([one, other])
    assert both.value == pytest.approx((one.mean() + other.mean()) / 2)
    error = (stats.sem(one) ** 2 + stats.sem(other) ** 2) ** 0.5 / 2
    assert both.high - both.value == pytest.approx(1.959964 * error)
