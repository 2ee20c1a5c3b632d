"""Which experts serve which domain, which tokens they work on, and which work together."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from moescope.model.decoder import CausalLM
from moescope.scope.choices import Choices, Ints, Progress, observe
from moescope.scope.information import explained_by_token, jackknife, shares, smoothed_lift
from moescope.scope.saved import Saved, rounded
from moescope.text.documents import Document
from moescope.text.tokenizer import Tokenizer

TYPICAL = 8
"""Most tokens that are kept for an expert."""
PAIRS = 16
"""Most pairs of experts that are kept for a layer."""
BLOCKS = 20
"""Blocks of neighbouring text in each domain, for the jackknife."""
BEFORE, AFTER = 8, 4
"""Tokens of context on either side."""
TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class TypicalToken:
    """A token that an expert receives more often than others do.

    Attributes:
        id: in the vocabulary.
        text: its spelling; a piece of a character reads U+FFFD.
        count: how often the expert received it.
        lift: that, over what it would be if the expert took its share of every token alike.
        context: the text around its first occurrence among them.
    """

    id: int
    text: str
    count: int
    lift: float
    context: str


@dataclass(frozen=True)
class Pair:
    """Two experts that often work on the same token.

    Attributes:
        experts: their numbers.
        count: tokens that both received.
        lift: that, over what it would be if they chose independently.
    """

    experts: tuple[int, int]
    count: int
    lift: float


@dataclass(frozen=True)
class Specialization(Saved):
    """What labelled text shows of a model's experts; special tokens are not counted.

    Attributes:
        model: what it was loaded as.
        version: of moescope.
        domains: their names.
        documents: of each domain.
        tokens: of each domain.
        layers: indices of the mixture-of-experts layers.
        load: `[domain][layer position][expert]`: share of the domain's routed slots.
        mutual_information: `[layer position]`: bits that a token's expert tells about its
            domain, were all domains as frequent; corrected for chance, so that it may fall
            slightly below 0. At most `log2(domains)`.
        mutual_information_error: its standard error, bits.
        token_share: `[layer position]`: from 0 to 1, how far the token alone decides over its
            experts; the rest is context. (`information.explained_by_token`)
        typical: `[layer position][expert]`: up to eight tokens, by their lift with a few
            imagined occurrences at the rate of chance, so that rare tokens do not win by luck.
        together: `[layer position]`: up to sixteen pairs of experts, ranked the same way.
        command: that measured it, if one did.
        held_out: domain -> whether no model was trained on its text, as far as models remember;
            empty where nobody asked.
    """

    noun: ClassVar[str] = "a specialization"

    model: str
    version: str
    domains: list[str]
    documents: list[int]
    tokens: list[int]
    layers: list[int]
    load: list[list[list[float]]]
    mutual_information: list[float]
    mutual_information_error: list[float]
    token_share: list[float]
    typical: list[list[list[TypicalToken]]]
    together: list[list[Pair]]
    command: str = ""
    held_out: dict[str, bool] = field(default_factory=dict[str, bool])


def specialize(
    name: str,
    model: CausalLM,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    progress: Progress | None = None,
    *,
    window: int | None = None,
) -> Specialization:
    """Run labelled documents, sorted by domain, through a model and see who serves whom.

    Numbers are kept at four significant digits.

    Args:
        name: what the model was loaded as.
        model: has routed experts.
        tokenizer: the model's.
        documents: as `texts.labelled_text` returns them.
        progress: called with (tokens read, tokens in all).
        window: tokens read at once; `texts.window_length` where it is left out.

    Raises:
        UserError: the model has no routed experts.
    """
    choices = observe(model, tokenizer, documents, progress, window)
    blocks = [block_counts(choices, domain) for domain in range(len(choices.domains))]
    information, error = jackknife(blocks)
    load = shares(np.stack([counts.sum(axis=0) for counts in blocks]))
    labels = [document.domain for document in documents]
    return Specialization(
        model=name,
        version=version("moescope"),
        domains=choices.domains,
        documents=[labels.count(domain) for domain in choices.domains],
        tokens=np.bincount(choices.domain, minlength=len(choices.domains)).tolist(),
        layers=choices.layers,
        load=[[[rounded(x) for x in row] for row in domain] for domain in load.tolist()],
        mutual_information=[rounded(x) for x in information.tolist()],
        mutual_information_error=[rounded(x) for x in error.tolist()],
        token_share=[
            rounded(explained_by_token(choices.token_ids, choices.document, topk_ids))
            for topk_ids in choices.topk_ids
        ],
        typical=[typical_tokens(choices, topk_ids, tokenizer) for topk_ids in choices.topk_ids],
        together=[
            co_activation(topk_ids, choices.n_routed_experts) for topk_ids in choices.topk_ids
        ],
    )


def block_counts(choices: Choices, domain: int) -> Ints:
    """Count a domain's routed slots by block of its text: `(blocks, layers, experts)`."""
    tokens = np.flatnonzero(choices.domain == domain)
    blocks = np.array_split(tokens, max(1, min(BLOCKS, len(tokens))))
    return np.stack(
        [
            np.stack(
                [_counts(topk_ids[b], choices.n_routed_experts) for topk_ids in choices.topk_ids]
            )
            for b in blocks
        ]
    )


def typical_tokens(
    choices: Choices, topk_ids: npt.NDArray[np.int32], tokenizer: Tokenizer
) -> list[list[TypicalToken]]:
    """Return each expert's typical tokens in one layer, with `(tokens, slots)` choices."""
    tokens, slots = np.nonzero(topk_ids >= 0)
    vocabulary = int(choices.token_ids.max()) + 1
    keys = topk_ids[tokens, slots].astype(np.int64) * vocabulary + choices.token_ids[tokens]
    pairs, first, count = np.unique(keys, return_index=True, return_counts=True)
    expert, token_id = pairs // vocabulary, pairs % vocabulary
    share = _counts(topk_ids, choices.n_routed_experts) / len(topk_ids)
    expected = share[expert] * np.bincount(choices.token_ids)[token_id]
    rank = smoothed_lift(count, expected)
    typical: list[list[TypicalToken]] = []
    for number in range(choices.n_routed_experts):
        mine = np.flatnonzero((expert == number) & (count > expected))
        best = mine[np.argsort(-rank[mine], kind="stable")][:TYPICAL]
        typical.append(
            [
                TypicalToken(
                    id=int(token_id[i]),
                    text=tokenizer.decode([int(token_id[i])]),
                    count=int(count[i]),
                    lift=rounded(float(count[i] / expected[i])),
                    context=_context(choices, int(tokens[first[i]]), tokenizer),
                )
                for i in best
            ]
        )
    return typical


def co_activation(topk_ids: npt.NDArray[np.int32], n_routed_experts: int) -> list[Pair]:
    """Return the pairs of experts that share most tokens against chance, best first."""
    both = np.zeros((n_routed_experts, n_routed_experts))
    for start in range(0, len(topk_ids), TOKENS_AT_ONCE):
        part = topk_ids[start : start + TOKENS_AT_ONCE]
        chosen = np.zeros((len(part), n_routed_experts + 1), dtype=np.float32)
        np.put_along_axis(chosen, part.astype(np.int64), 1.0, axis=1)  # UNUSED is the last column
        both += chosen[:, :-1].T @ chosen[:, :-1]
    alone = both.diagonal()
    left, right = np.triu_indices(n_routed_experts, k=1)
    count = both[left, right].astype(np.int64)
    expected = alone[left] * alone[right] / max(len(topk_ids), 1)
    order = np.argsort(-smoothed_lift(count, expected), kind="stable")[:PAIRS]
    return [
        Pair((int(left[i]), int(right[i])), int(count[i]), rounded(float(count[i] / expected[i])))
        for i in order
        if count[i] > expected[i]
    ]


def _counts(topk_ids: npt.NDArray[np.int32], n_routed_experts: int) -> Ints:
    """Tokens that each expert received, `(n_routed_experts,)`."""
    return np.bincount(topk_ids.ravel() + 1, minlength=n_routed_experts + 1)[1:]


def _context(choices: Choices, place: int, tokenizer: Tokenizer) -> str:
    """The text around a token, not beyond its document."""
    start, end = max(0, place - BEFORE), place + AFTER + 1
    mine = choices.document[start:end] == choices.document[place]
    return tokenizer.decode(choices.token_ids[start:end][mine].tolist()).strip("\ufffd")
