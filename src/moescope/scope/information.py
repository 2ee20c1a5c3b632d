"""How much one thing tells about another: mutual information, lift, explained choices."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

IMAGINED = 5.0
"""Occurrences at the rate of chance that are added before rare things are ranked by lift."""


def entropy(probabilities: Floats) -> Floats:
    """Entropy in bits over the last axis."""
    logs = np.log2(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return -(probabilities * logs).sum(axis=-1)


def shares(counts: npt.NDArray[np.int64] | Floats) -> Floats:
    """Counts over their sum along the last axis; nothing counted gives zeros."""
    total = counts.sum(axis=-1, keepdims=True)
    return counts / np.maximum(total, 1)


def mutual_information(counts: npt.NDArray[np.int64] | Floats) -> Floats:
    """Bits that an outcome tells about its group, were every group as likely: plug-in estimate.

    `H(mean of the groups' shares) - mean of H(each group's shares)`, the Jensen-Shannon
    divergence of the groups (Lin 1991, eq. 4.1). At most `log2(groups)`.

    Args:
        counts: `(groups, ..., outcomes)`; the result has shape `(...)`.
    """
    probabilities = shares(counts)
    return entropy(probabilities.mean(axis=0)) - entropy(probabilities).mean(axis=0)


def jackknife(blocks: Sequence[Ints]) -> tuple[Floats, Floats]:
    """Mutual information without most of its bias, and its standard error.

    Few observations look more different than they are. Leaving out one block at a time, in each
    group by itself, shows how the estimate shrinks with more of them (the jackknife for several
    samples, Arvesen 1969); blocks of neighbouring text keep what depends on each other together.

    Args:
        blocks: for each group `(blocks, ..., outcomes)` counts; a group with a single block
            contributes nothing to the correction or the error.

    Returns:
        Estimate and standard error in bits, shape `(...)` each. Where the groups do not differ
        the error is too large by up to a half.
    """
    whole = np.stack([parts.sum(axis=0) for parts in blocks])
    estimate = mutual_information(whole)
    bias, variance = np.zeros_like(estimate), np.zeros_like(estimate)
    for group, parts in enumerate(blocks):
        without: list[Floats] = []
        for part in parts if len(parts) > 1 else ():
            rest = whole.copy()
            rest[group] -= part
            without.append(mutual_information(rest))
        if without:
            mean = np.mean(without, axis=0)
            bias += (len(parts) - 1) * (mean - estimate)
            variance += (len(parts) - 1) * np.var(without, axis=0)
    return estimate - bias, np.sqrt(variance)


def smoothed_lift(count: Ints, expected: Floats) -> Floats:
    """Count over what chance would give, with `IMAGINED` occurrences added to both."""
    return (count + IMAGINED) / (expected + IMAGINED)


def explained_by_token(token_ids: Ints, document: Ints, topk_ids: npt.NDArray[np.int32]) -> float:
    """Share of the differences between tokens' experts that the token's identity explains.

    Write a token's choice as a vector of ones and zeros over the experts. The share is one minus
    the variance among occurrences of the same token over the variance among all: 1 if the token
    alone decides, 0 if knowing it helps nothing. Both variances come from pairs of occurrences in
    different documents, which makes them unbiased and keeps a text's repetitions out: with `o`
    the mean number of experts that a pair shares, a variance is `mean experts a token - o`.

    Tokens that occur in a single document say nothing and are left out.

    Args:
        token_ids: `(tokens,)`.
        document: which document each token is of, `(tokens,)`.
        topk_ids: `(tokens, slots)`, -1 where a token has fewer experts.

    Returns:
        The share, or 0 where no token occurs in two documents or all choices are the same.
    """
    token, occurrences = np.unique(token_ids, return_inverse=True)[1], len(token_ids)
    everything = np.zeros(occurrences, dtype=np.int64)
    same, weight, eligible = _shared_in_pairs(token, document, topk_ids)
    if not eligible.any():
        return 0.0
    chosen = eligible[token]
    any_pair, _, _ = _shared_in_pairs(everything[chosen], document[chosen], topk_ids[chosen])
    size = float((topk_ids[chosen] >= 0).sum(axis=1).mean())
    among_same = size - float(np.average(same[eligible], weights=weight[eligible]))
    among_all = size - float(any_pair[0])
    return 1 - among_same / among_all if among_all > 0 else 0.0


def _shared_in_pairs(
    kind: Ints, document: Ints, topk_ids: npt.NDArray[np.int32]
) -> tuple[Floats, Ints, npt.NDArray[np.bool_]]:
    """Experts that two occurrences of a kind share on average, if they are of two documents.

    Returns:
        By kind: the mean over ordered pairs, how often the kind occurs, and whether there is
        such a pair.
    """
    kinds = int(kind.max()) + 1
    place = np.unique(np.stack([kind, document]), axis=1, return_inverse=True)
    of_place, (kind_of_place, _) = place[1].ravel(), place[0]
    counts, counts_of_place = np.bincount(kind), np.bincount(of_place)
    pairs = counts**2 - _sums(counts_of_place**2, kind_of_place, kinds)

    tokens, slots = np.nonzero(topk_ids >= 0)
    expert = topk_ids[tokens, slots].astype(np.int64)
    experts = int(topk_ids.max()) + 1
    key, chosen = np.unique(kind[tokens] * experts + expert, return_counts=True)
    shared = _sums(chosen**2, key // experts, kinds)
    key, chosen = np.unique(of_place[tokens] * experts + expert, return_counts=True)
    shared -= _sums(chosen**2, kind_of_place[key // experts], kinds)
    return shared / np.maximum(pairs, 1), counts, pairs > 0


def _sums(values: Ints, groups: Ints, n_groups: int) -> Ints:
    sums = np.zeros(n_groups, dtype=np.int64)
    np.add.at(sums, groups, values)
    return sums
