"""A training's history in one small file: losses, balance, and who served whom over the steps."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from moescope.errors import UserError
from moescope.scope.saved import Saved, rounded

FILE = "training_history.json"
"""What the history of a packed model is called in its folder."""
METRICS, LOADS, SUMMARY = "metrics.jsonl", "expert_load.jsonl", "training.json"
"""What a training writes into its own folder."""
MOST_ROWS = 600
"""Rows beyond this many are thinned out, but none that was evaluated."""
MAX_LOADS = 60
"""Rows whose load per expert is kept."""


@dataclass(frozen=True)
class TrainingRow:
    """One logged step.

    Attributes:
        step: from 1.
        loss: of the step's own text, nats per token.
        held_out: nats per token of each domain, where the step was evaluated.
        max_violation: of each mixture-of-experts layer, by its index (the busiest expert's
            surplus over an even share).
        experts_per_token: of each such layer, the mean over the step's tokens.
        load: of each such layer, every expert's share of the step's routed slots; logged every
            few steps, empty in between.
    """

    step: int
    loss: float
    held_out: dict[str, float]
    max_violation: dict[str, float]
    experts_per_token: dict[str, float] = field(default_factory=dict[str, float])
    load: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


@dataclass(frozen=True)
class ExpertsSnapshot:
    """Who served whom at one step.

    Attributes:
        step: from 1.
        load: `[domain][layer position][expert]`: share of the domain's routed slots; zeros where
            the training did not read the domain at that time.
    """

    step: int
    load: list[list[list[float]]]

    def over(self, own: Sequence[str], domains: Sequence[str]) -> "ExpertsSnapshot":
        """Return the same for `domains`; nobody served those that are not among its `own`."""
        nobody = [[0.0] * len(layer) for layer in self.load[0]]
        known = dict(zip(own, self.load, strict=True))
        return replace(self, load=[known.get(domain, nobody) for domain in domains])


@dataclass(frozen=True)
class History(Saved):
    """A training from its first step to its last.

    Attributes:
        steps: so many it has, or will have.
        domains: of the snapshots.
        rows: ascending; at most some hundreds.
        snapshots: ascending; none in a dense model.
        sittings: steps after which it went on with a new optimizer, ascending.
        held_out: nats a token of each domain's held-out text, with the weights that are kept, where
            those were measured by themselves.
    """

    noun: ClassVar[str] = "a training's history"

    steps: int
    domains: list[str]
    rows: list[TrainingRow]
    snapshots: list[ExpertsSnapshot]
    sittings: list[int] = field(default_factory=list[int])
    held_out: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def last_held_out(self) -> dict[str, float]:
        """What was measured last of each domain's held-out text; empty if nothing was."""
        measured = [row.held_out for row in self.rows if row.held_out]
        return self.held_out or (measured[-1] if measured else {})

    def after(self, earlier: "History") -> "History":
        """Return one history of `earlier` and of this training, which began with its weights.

        Steps count on. Of a domain that only one of the two read, the other's experts served none.
        """
        before = earlier.rows[-1].step
        domains = [*self.domains, *(d for d in earlier.domains if d not in self.domains)]
        rows = [replace(row, step=before + row.step) for row in self.rows]
        moved = [replace(one, step=before + one.step) for one in self.snapshots]
        return History(
            steps=before + self.steps,
            domains=domains,
            rows=_thinned([*earlier.rows, *rows]),
            snapshots=[
                *(one.over(earlier.domains, domains) for one in earlier.snapshots),
                *(one.over(self.domains, domains) for one in moved),
            ],
            sittings=[*earlier.sittings, before, *(before + step for step in self.sittings)],
        )


def history_of(run: Path) -> History:
    """Gather the history of the training in the folder `run`, finished or not.

    Raises:
        UserError: there is no training in it.
    """
    rows = [to_row(fields) for fields in _json_lines(run / METRICS) if _has_loss(fields)]
    if not rows:
        raise UserError(f"there is no training in {run}: it lacks {METRICS} with a step in it")
    loads = list(_json_lines(run / LOADS))
    domains = list(loads[-1]["load"]) if loads else []
    snapshots = [_snapshot(fields, domains) for fields in loads]
    return History(
        steps=max(planned_steps(run), rows[-1].step),
        domains=domains,
        rows=_thinned(rows),
        snapshots=[snapshot for snapshot in snapshots if snapshot.load and snapshot.load[0]],
    )


def to_row(fields: Mapping[str, Any]) -> TrainingRow:
    """Take from a line of `metrics.jsonl` what pictures need."""
    return TrainingRow(
        step=fields["step"],
        loss=rounded(fields["loss"]),
        held_out={d: rounded(loss) for d, loss in fields.get("held_out_loss", {}).items()},
        max_violation={i: rounded(x) for i, x in fields.get("max_violation", {}).items()},
        experts_per_token={i: rounded(x) for i, x in fields.get("experts_per_token", {}).items()},
        load={i: [rounded(x) for x in load] for i, load in fields.get("load", {}).items()},
    )


def _has_loss(fields: Mapping[str, Any]) -> bool:
    """Whether a step had a loss; one that was skipped has none."""
    return fields.get("loss") is not None


def planned_steps(run: Path) -> int:
    """How many steps the training in `run` was to have; 0 while nothing tells."""
    states = sorted(run.glob("checkpoints/*/state.json"), key=lambda path: path.stat().st_mtime)
    for file in (run / SUMMARY, *reversed(states)):
        try:
            return json.loads(file.read_text(encoding="utf-8"))["config"]["training"]["steps"]
        except (OSError, ValueError, KeyError):
            continue  # not written yet, or not whole
    return 0


class Follower:
    """Reads what a training that runs now adds to its metrics, without touching it."""

    def __init__(self, run: Path) -> None:
        self._file = run / METRICS
        self._place: tuple[int, int] | None = None  # the file's number on disk, and bytes read

    def new_rows(self) -> list[TrainingRow]:
        """Return the rows since the last call; all of them at first, and after a resumption."""
        try:
            with self._file.open("rb") as stream:
                number = os.fstat(stream.fileno()).st_ino
                if self._place is not None and self._place[0] == number:
                    stream.seek(self._place[1])
                start, text = stream.tell(), stream.read()
        except OSError:
            return []  # the training has not begun to write
        whole = text.rpartition(b"\n")[0]
        self._place = number, start + (len(whole) + 1 if whole else 0)
        lines = [json.loads(line) for line in whole.splitlines()]
        return [to_row(fields) for fields in lines if _has_loss(fields)]


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file that may be growing; none if it is not there."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue  # the last line, half written


def _snapshot(fields: Mapping[str, Any], domains: list[str]) -> ExpertsSnapshot:
    """Turn counts, domain -> layer -> expert, into shares of each domain's slots."""
    load = [
        [
            [rounded(count / max(sum(counts), 1)) for count in counts]
            for _, counts in sorted(fields["load"][domain].items(), key=lambda item: int(item[0]))
        ]
        for domain in domains
    ]
    return ExpertsSnapshot(fields["step"], load)


def _thinned(rows: list[TrainingRow]) -> list[TrainingRow]:
    """Leave out rows that stand close to others, evenly over the steps."""
    apart = rows[-1].step / MOST_ROWS
    loaded = [row.step for row in rows if row.load]
    loaded = _spread(loaded, rows[-1].step / MAX_LOADS)
    steps = _spread([row.step for row in rows], apart) | loaded | {rows[-1].step}
    return [
        row if row.step in loaded else replace(row, load={})
        for row in rows
        if row.step in steps or row.held_out
    ]


def _spread(steps: list[int], apart: float) -> set[int]:
    """Of ascending steps the first in each stretch of so many."""
    return {*{int((step - 1) // apart): step for step in reversed(steps)}.values()}
