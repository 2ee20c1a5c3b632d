"""In what parts something long is computed, for who computes it beside others."""

from collections.abc import Callable
from dataclasses import dataclass


def _go_on() -> None:
    """Let nobody go first."""


@dataclass(frozen=True)
class Parts:
    """How much is computed at a time.

    Attributes:
        tokens: of a text that one pass reads; None for all.
        rows: hidden states of which logits over the vocabulary are made at a time.
        pause: called after each part; others may go first in it.
    """

    tokens: int | None = None
    rows: int = 256
    pause: Callable[[], None] = _go_on


WHOLE = Parts()
"""As fast as it gets."""
