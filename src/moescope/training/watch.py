"""Whether a training fails, and the sentence that says so with a way out."""

import math
from collections import deque
from collections.abc import Sequence

RECENT_STEPS = 100
"""Steps over which the loss is held against chance."""
MAX_SKIPPED = 5
"""Steps in a row without a finite gradient, after which a training ends."""


class Watch:
    """Holds the loss of late against chance, and counts steps without a finite gradient.

    Chance is the loss of a model that finds all words equally likely, `ln(vocab_size)` nats. A
    model that is no better long after its warm-up has learned nothing, or was thrown far off by
    rates that are too high; both go on for ever without an error.

    Attributes:
        skipped: steps in a row whose gradient was not finite.
    """

    def __init__(self, vocab_size: int, warmup_steps: int) -> None:
        self.chance = math.log(vocab_size)
        self.skipped = 0
        self._warmup_steps = warmup_steps
        self._losses: deque[float] = deque(maxlen=RECENT_STEPS)
        self._has_told = False

    def add(self, step: int, loss: float) -> None:
        """Take in the loss of a step whose gradient was finite."""
        self.skipped = 0
        if step > self._warmup_steps:
            self._losses.append(loss)

    @property
    def recent_loss(self) -> float:
        """The mean over the last steps after the warm-up, not a number before there are any."""
        return sum(self._losses) / len(self._losses) if self._losses else math.nan

    @property
    def is_failing(self) -> bool:
        """Whether the loss is no better than chance over as many steps as are watched."""
        return len(self._losses) == RECENT_STEPS and self.recent_loss >= self.chance

    def news(self) -> str | None:
        """Return the sentence about a failing training when it is due: once for each failure."""
        if not self.is_failing:
            self._has_told = False
            return None
        if self._has_told:
            return None
        self._has_told = True
        return self.verdict()

    def verdict(self) -> str | None:
        """Return what the last steps say of a training that is no better than chance."""
        if not self.recent_loss >= self.chance:
            return None
        return (
            f"the loss over the last {len(self._losses)} steps is {self.recent_loss:.2f}, no "
            f"better than guessing (ln of the vocabulary, {self.chance:.2f})"
        )


def way_back(saved: Sequence[int], muon: float, adamw: float) -> str:
    """Say how a failed training goes on, with the steps of its checkpoints and its rates."""
    rates = f"lower muon_learning_rate ({muon:g}) and adamw_learning_rate ({adamw:g}) in the config"
    if not saved:
        return f"{rates} and begin again, in another folder"
    steps = ", ".join(map(str, saved))
    return (
        f"{rates}, which a resumed training may, and go back with --from-step to a checkpoint from "
        f"before it went wrong (there are {steps}), or begin again in another folder"
    )
