"""How likely a text's given tokens were, each after those before it."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moescope.engine.sampling import likeliest, log_sums
from moescope.engine.sequence import PromptLogprob, Sequence

ROWS = 32
"""Tokens whose logits are held at a time: at a vocabulary of 102,400, 13 MB of them."""


def score_prompt(
    sequence: Sequence, start: int, states: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> None:
    """Note how likely the tokens of a prompt were that follow those that have been read.

    Args:
        sequence: the text; what it has been told already stays.
        start: place of the first token that was read.
        states: `(tokens, hidden)` before the last norm, of those.
        logits_of: from `(tokens, hidden)` to `(tokens, vocab)`.
    """
    known = sequence.prompt_logprobs
    assert known is not None
    first, last = len(known), min(start + len(states) + 1, sequence.prompt_tokens)  # of those told
    for begin in range(first, last, ROWS):
        ids = sequence.ids[begin : min(begin + ROWS, last)]
        logits = logits_of(states[begin - 1 - start :][: len(ids)])
        known.extend(_scored(logits, ids, sequence.params.prompt_logprobs or 0))


def all_finite(known: list[PromptLogprob | None] | None) -> bool:
    """Whether all that is known of a prompt are numbers."""
    return all(one is None or math.isfinite(one.logprob) for one in known or ())


def _scored(logits: Tensor, ids: list[int], top: int) -> Iterator[PromptLogprob]:
    """Score each id by its row of `(ids, vocab)` logits."""
    sums = log_sums(logits)  # (ids,)
    own = logits.gather(1, torch.tensor(ids, device=logits.device)[:, None])  # (ids, 1)
    ranks = 1 + (logits > own).sum(-1, dtype=torch.int32)
    best_ids, best = torch.empty(len(ids), 0), torch.empty(len(ids), 0)
    if top:
        best_ids, best = likeliest(logits, min(top, logits.shape[-1]))
    rows = zip(ids, own[:, 0].tolist(), sums.tolist(), ranks.tolist(), strict=True)
    for (token_id, logit, log_sum, rank), others, values in zip(
        rows, best_ids.tolist(), best.tolist(), strict=True
    ):
        best_logprobs = tuple((i, v - log_sum) for i, v in zip(others, values, strict=True))
        yield PromptLogprob(token_id, logit - log_sum, rank, best_logprobs)
