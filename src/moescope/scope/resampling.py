"""How sure a number is that was measured on a sample of documents."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def rate_intervals(amounts: Floats, sizes: npt.NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """Bootstrap `sum of amounts / sum of sizes` over documents (percentile interval).

    Documents, not tokens, are drawn anew, 2,000 times with a fixed seed: tokens of a document
    depend on each other. (Efron and Tibshirani 1993, section 13.3.) Where each document's amount
    is a difference between two models, the comparison is paired.

    Args:
        amounts: `(documents, ...)`, such as the nats of each document.
        sizes: `(documents,)`, such as its tokens.

    Returns:
        The rate and both ends of its 95 % interval, shape `(...)` each. With fewer than about
        twenty documents the interval is somewhat too narrow; there must be two.
    """
    documents = len(sizes)
    rng = np.random.default_rng(0)
    even = np.full(documents, 1 / documents)
    drawn = rng.multinomial(documents, even, size=RESAMPLES).astype(np.float64)
    flat = amounts.reshape(documents, -1)
    rates = (drawn @ flat) / np.maximum(drawn @ sizes, 1)[:, None]  # (resamples, numbers)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(rates, [tail, 1 - tail], axis=0)
    shape = amounts.shape[1:]
    return (
        flat.sum(axis=0).reshape(shape) / max(sizes.sum(), 1),
        low.reshape(shape),
        high.reshape(shape),
    )


def rate_interval(amounts: Floats, sizes: npt.NDArray[np.int64]) -> Interval:
    """Do the same for one number, from amounts `(documents,)`."""
    value, low, high = rate_intervals(amounts, sizes)
    return Interval(float(value), float(low), float(high))


def mean_of_groups(groups: Sequence[Floats]) -> Interval:
    """Return the mean over groups that count alike, each of two values or more.

    The 95 % interval is the normal one for a stratified mean (Cochran 1977, section 5.6). Where
    each value is a difference between two models on one text, the comparison is paired.
    """
    mean = statistics.fmean(float(group.mean()) for group in groups)
    variances = [float(group.var(ddof=1)) / len(group) for group in groups]
    half = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * sum(variances) ** 0.5
    return Interval(mean, mean - half / len(groups), mean + half / len(groups))


def t_interval(values: Sequence[float]) -> Interval:
    """Return the mean of two values or more, with its 95 % interval by Student's t."""
    from scipy import stats

    mean = statistics.fmean(values)
    error = statistics.stdev(values) / len(values) ** 0.5
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)
