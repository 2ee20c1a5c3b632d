"""How a small mixture learned to reason: its reinforcement, and R1's path in miniature."""

from dataclasses import dataclass
from typing import ClassVar

from moescope.catalog import BOX
from moescope.scope.saved import Saved

FILE = BOX / "reason" / "history.json"
"""The history in the box; `recipes/reason/history.py` writes it."""


@dataclass(frozen=True)
class ReasoningQuestion:
    """A problem that is put again and again, and never learned from.

    Attributes:
        task: that it belongs to: `sums` or `letters`.
        level: how hard it is: digits of a sum, or half a word's letters.
        text: as it is put.
    """

    task: str
    level: int
    text: str


@dataclass(frozen=True)
class ReasoningAnswer:
    """The likeliest answer to a question at some step.

    Attributes:
        text: with its thought, between `<think>` and `</think>`.
        reward: 1 is right.
        tokens: that it took.
        experts: `[layer position][expert]`: how often its tokens, those of the question too, went
            to each expert.
    """

    text: str
    reward: float
    tokens: int
    experts: list[list[int]]


@dataclass(frozen=True)
class ReasoningSnapshot:
    """The answers to all questions before the step after `step`.

    Attributes:
        step: 0 is the model that reinforcement starts from.
        accuracy: share of right answers to all held-out problems, of which the questions are some.
        answers: in the questions' order.
    """

    step: int
    accuracy: float
    answers: list[ReasoningAnswer]


@dataclass(frozen=True)
class ReasoningStep:
    """What a step of reinforcement showed.

    Attributes:
        step: from 1.
        reward: mean over the step's answers.
        right: share of right answers.
        tokens: of an answer, mean.
        entropy: nats a token, of the answers that were learned from; None where none taught.
        differing: share of the choices of experts that the trainer would make otherwise than the
            sampler.
        apart: mean difference of an answer token's probability between sampler and trainer.
        violation: the busiest expert's surplus over an even share, in the worst layer.
    """

    step: int
    reward: float
    right: float
    tokens: float
    entropy: float | None
    differing: float | None
    apart: float | None
    violation: float | None


@dataclass(frozen=True)
class ReasoningRun:
    """One reinforcement.

    Attributes:
        name: `zero` (from the pretrained model) or `cold` (after a cold start).
        seed: of its problems and draws.
        steps: ascending.
        snapshots: ascending.
    """

    name: str
    seed: int
    steps: list[ReasoningStep]
    snapshots: list[ReasoningSnapshot]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of all seeds.
        half: how far its 95 % interval reaches on either side; None of a single seed.
    """

    mean: float
    half: float | None


@dataclass(frozen=True)
class ReasoningStage:
    """A model on the path, measured at temperature 1.

    Attributes:
        name: `base`, `zero`, `cold`, `cold-rl`, `dense`, `dense-rl` or `distilled`.
        seeds: so many were trained.
        one: how often one answer is right (pass@1).
        any: how often one of sixteen is (pass@16).
        tokens: of an answer.
        voted: how often answers at once are right by vote, as many as take an answer's tokens.
    """

    name: str
    seeds: int
    one: Estimate
    any: Estimate
    tokens: Estimate
    voted: Estimate


@dataclass(frozen=True)
class ReasoningHistory(Saved):
    """All of it.

    Attributes:
        parameters: of the mixture.
        active: of them at work on each token.
        layers: indices of its mixture-of-experts layers.
        questions: forty.
        runs: that can be replayed.
        stages: of the path, in its order.
    """

    noun: ClassVar[str] = "a history of reinforcement"

    parameters: int
    active: int
    layers: list[int]
    questions: list[ReasoningQuestion]
    runs: list[ReasoningRun]
    stages: list[ReasoningStage]
