"""What varies between the kinds of training: what a step reads, and what it minimises."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from moescope.model.decoder import CausalLM
from moescope.text.split import TrainedText
from moescope.text.tokenizer import Tokenizer
from moescope.training.objective import BalanceRecorder, Losses
from moescope.training.part import Part

Say = Callable[[str], None]


P = TypeVar("P", bound=Part)


class Kind(Protocol[P]):
    """A kind of training, as the trainer's loop sees it.

    Attributes:
        device: where its parts lie.
        tokenizer: saved beside the model.
        remembered: by what the text, and what of it was held out, is known again.
        tokens: that the steps so far have read.
        evaluates_first: whether it is measured before its first step, too.
    """

    device: torch.device
    tokenizer: Tokenizer
    remembered: TrainedText | None
    tokens: int
    evaluates_first: bool

    def updates(self, model: CausalLM, step: int) -> Iterable[Sequence[P]]:
        """Yield what each move of the weights in `step` learns from; most kinds yield once.

        Every rank is given the same, all rows of it.
        """
        ...

    def losses(self, model: CausalLM, part: P, recorder: BalanceRecorder) -> Losses:
        """Run the network over a part, as much of it as this rank computes."""
        ...

    def row(self) -> dict[str, Any]:
        """Return what is logged of the last step beside its losses."""
        ...

    def evaluate(self, model: CausalLM, out: Path, step: int, say: Say) -> dict[str, Any]:
        """Measure the model on what it does not learn from; keep details in `out`."""
        ...

    def sentence(self, row: dict[str, Any]) -> str:
        """Say what `evaluate` found."""
        ...

    def notes(self, steps: int) -> list[str]:
        """Return what a user should know before the first step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return as JSON-able numbers what continues it bit for bit, beside weights."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        ...

    def keep_reading(self, state: dict[str, Any]) -> None:
        """Take over the position of an earlier training, where it fits; else do nothing."""
        ...
