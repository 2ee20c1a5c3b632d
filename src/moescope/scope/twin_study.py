"""A small mixture beside dense twins that were trained as it was: does it pay?"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from moescope.catalog import BOX
from moescope.scope.resampling import Interval
from moescope.scope.saved import Saved

FILE = BOX / "twins.json"
"""The study in the box; `recipes/twins/pack.py` writes it."""

RunName = Literal["mixture", "active", "total", "active-time", "total-time"]
"""`active` has as many parameters as the mixture puts to work on a token, `total` as many as it has
in all; `-time` read as many tokens as there is time for in the mixture's training.
"""
RUNS: tuple[RunName, ...] = get_args(RunName)
AT_EQUAL_TOKENS = RUNS[:3]


@dataclass(frozen=True)
class TwinRun:
    """One training.

    Attributes:
        name: what it is to the others.
        parameters: in all.
        active: at work on a token.
        tokens: read in training.
        seconds: that this takes on a quiet machine.
        held_out: nats a token of each domain's held-out text at its end.
        lead: nats a token by which the mixture is ahead, the mean over all domains, with the
            interval that the held-out text leaves; None for the mixture itself.
    """

    name: RunName
    parameters: int
    active: int
    tokens: int
    seconds: float
    held_out: dict[str, float]
    lead: Interval | None


@dataclass(frozen=True)
class TwinStudy(Saved):
    """The runs in the order of `RUNS`; those at equal time may be missing together."""

    noun: ClassVar[str] = "a study of twins"

    runs: list[TwinRun]

    def __post_init__(self) -> None:
        names = tuple(run.name for run in self.runs)
        if names not in (RUNS, AT_EQUAL_TOKENS):
            raise ValueError(f"the runs are {', '.join(names)}; they have to be {', '.join(RUNS)}")
        for run in self.runs:
            if not run.held_out or run.held_out.keys() != self.runs[0].held_out.keys():
                raise ValueError(f"{run.name} was not measured on the domains of the mixture")
            if (run.lead is None) != (run.name == "mixture"):
                raise ValueError(
                    f"{run.name} has to say how far the mixture is ahead of it"
                    if run.lead is None
                    else "mixture has to say how far it is ahead in the other runs alone"
                )
