"""Put the study of twins into the box: `python recipes/twins/pack.py runs/twins`.

Reads the trainings of README.md, measures each held-out window anew for the intervals, and refuses
what was not matched as README.md says.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moescope.checkpoint import load_model
from moescope.errors import UserError
from moescope.families import open_config
from moescope.files import read_object
from moescope.model.costs import count_parameters
from moescope.scope.losses import document_losses
from moescope.scope.resampling import Interval, mean_of_groups
from moescope.scope.saved import rounded
from moescope.scope.twin_study import (
    AT_EQUAL_TOKENS,
    FILE,
    RUNS,
    RunName,
    TwinRun,
    TwinStudy,
)
from moescope.training.batches import HeldOutBatches
from moescope.training.data import ShardIndex

Losses = dict[str, npt.NDArray[np.float64]]
"""Domain -> nats a token of each held-out window."""

SAME_TIME = 0.02
"""What trainings of equal time may differ by."""
SAME_LOSS = 0.02
"""Nats by which a loss that is measured anew may differ from the training's own."""


def main() -> None:
    runs = Path(sys.argv[1])
    file = Path(sys.argv[2]) if len(sys.argv) > 2 else FILE
    try:
        study = pack(runs)
        study.save(file)
    except UserError as error:
        sys.exit(str(error))
    for run in study.runs:
        mean = statistics.fmean(run.held_out.values())
        ahead = f", mixture ahead by {run.lead}" if run.lead else ""
        print(f"{run.name}: {run.tokens:,} tokens, {run.seconds:,.0f} s, {mean:.4f} nats{ahead}")


def pack(runs: Path) -> TwinStudy:
    """Read all runs of a folder.

    Raises:
        UserError: one is missing, or differs from the others in what was to be matched.
    """
    timed = any((runs / name).exists() for name in RUNS if name not in AT_EQUAL_TOKENS)
    names = RUNS if timed else AT_EQUAL_TOKENS
    summaries = {name: read_object(runs / name / "training.json") for name in names}
    seconds = {name: summaries[name]["step"] * step_seconds(runs, name) for name in names}
    check_matched(summaries, seconds)
    losses = {name: window_losses(runs / name, summaries[name]) for name in names}
    packed: list[TwinRun] = []
    for name in names:
        counted = count_parameters(open_config(runs / name / "config.json"))
        mixture = name == "mixture"
        packed.append(
            TwinRun(
                name=name,
                parameters=counted.total,
                active=counted.active,
                tokens=summaries[name]["tokens"],
                seconds=rounded(seconds[name]),
                held_out={d: rounded(n) for d, n in summaries[name]["held_out_loss"].items()},
                lead=None if mixture else lead(losses["mixture"], losses[name]),
            )
        )
    return TwinStudy(packed)


def step_seconds(runs: Path, name: RunName) -> float:
    """What a step takes on a quiet machine: the median of a short training but for its first."""
    file = runs / f"quiet-{name.removesuffix('-time')}" / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read how long a step takes: {error}") from error
    taken = [json.loads(line)["seconds"] for line in lines[1:]]
    if not taken:
        raise UserError(f"{file} has one step only; its first is none to measure by")
    return statistics.median(taken)


def check_matched(summaries: dict[RunName, dict[str, Any]], seconds: dict[RunName, float]) -> None:
    ours = summaries["mixture"]
    for name, summary in summaries.items():
        for table in ("data", "evaluation"):
            if summary["config"][table] != ours["config"][table]:
                raise UserError(f"{name} was trained with another [{table}] than mixture")
        if name in AT_EQUAL_TOKENS and summary["tokens"] != ours["tokens"]:
            raise UserError(
                f"{name} read {summary['tokens']:,} tokens, mixture {ours['tokens']:,}; "
                "they have to read the same"
            )
        apart = seconds[name] / seconds["mixture"] - 1
        if name not in AT_EQUAL_TOKENS and abs(apart) > SAME_TIME:
            raise UserError(
                f"{name} takes {seconds[name]:,.0f} s on a quiet machine, mixture "
                f"{seconds['mixture']:,.0f} s; train it for another number of steps"
            )


def window_losses(run: Path, summary: dict[str, Any]) -> Losses:
    """Measure each window of the training's evaluation again."""
    model = load_model(run, dtype=torch.float32)
    folder = run / "shards" / "held_out"
    index = ShardIndex(folder, read_object(folder / "index.json"))
    longest = summary["config"]["data"]["sequence_length"]
    tokens = summary["config"]["evaluation"]["tokens"]
    found: Losses = {}
    for domain, told in summary["held_out_loss"].items():
        batches = HeldOutBatches(index, domain, 1, longest, tokens)
        windows = [row for ids in batches for row in ids.tolist()]
        length = len(windows[0]) - 1
        found[domain] = document_losses(model, windows, length) / length
        mean = float(found[domain].mean())
        if abs(mean - told) > SAME_LOSS:
            raise UserError(
                f"{run}: the held-out loss of {domain} is {mean:.4f} when measured again, and "
                f"{told:.4f} in training.json; this is another model or another text"
            )
    return found


def lead(mixture: Losses, twin: Losses) -> Interval:
    """Nats a token by which the mixture is ahead; domains count alike."""
    found = mean_of_groups([twin[domain] - mixture[domain] for domain in mixture])
    return Interval(rounded(found.value), rounded(found.low), rounded(found.high))


if __name__ == "__main__":
    main()
