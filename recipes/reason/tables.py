"""Put the runs of the path together: `python recipes/reason/tables.py runs/reason`.

Prints the tables of docs/numbers.md, and writes `results.json` into the folder. Intervals are 95 %,
of Student's t over the seeds.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moescope.scope.resampling import t_interval

STAGES = {
    "base": "pretrained",
    "zero": "R1-Zero: reinforced",
    "unreplayed": "the same without replay",
    "cold": "cold start",
    "cold-rl": "cold start, reinforced",
    "dense": "dense twin, pretrained",
    "dense-rl": "dense twin, reinforced",
    "distilled": "dense twin, distilled from R1-Zero",
}
SEEDS = range(3)
LAST = 20
"""Steps at the end over which curves are averaged."""
Row = dict[str, Any]


def main() -> None:
    runs = Path(sys.argv[1])
    found = {stage: measured(runs, stage) for stage in STAGES}
    found = {stage: rows for stage, rows in found.items() if rows}
    summary = {stage: summarised(rows) for stage, rows in found.items()}
    comparisons = compared(found)
    curves = {
        stage: told_of_steps(runs, stage)
        for stage in found
        if (runs / f"{stage}-0/metrics.jsonl").exists()
    }
    print_stages(summary)
    print_levels(found)
    print_comparisons(comparisons)
    print_steps(curves)
    results = {"stages": summary, "comparisons": comparisons, "steps": curves}
    (runs / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measured(runs: Path, stage: str) -> list[Row]:
    """Return what `measure.py` found of a stage, seed by seed; pretraining has one."""
    files = [runs / f"measured/{stage}-{seed}.json" for seed in SEEDS]
    files = [file for file in (runs / f"measured/{stage}.json", *files) if file.exists()]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def mean_of(row: Row, name: str) -> float:
    """Return the mean over all levels of all tasks."""
    return statistics.fmean(level[name] for level in row["levels"].values())


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean, and how far the interval reaches on either side of it."""
    if len(values) < 2:
        return {"mean": values[0], "half": math.nan, "seeds": 1}
    told = t_interval(values)
    return {"mean": told.value, "half": told.high - told.value, "seeds": len(values)}


def summarised(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    names = ("pass@1", "pass@16", "tokens", "thinks", "at_once", "voted")
    told = {name: interval([mean_of(row, name) for row in rows]) for name in names}
    for name in ("violation", "bits"):
        values = [[layer[name] for layer in row["experts"].values()] for row in rows]
        if values[0]:
            told[name] = interval([statistics.fmean(of) for of in values])
    return told


def compared(found: dict[str, list[Row]]) -> dict[str, dict[str, float]]:
    """Return the differences that were declared, as far as their runs are there."""
    each: Callable[[str, str], list[float]] = lambda stage, name: [  # noqa: E731
        mean_of(row, name) for row in found.get(stage, [])
    ]

    def apart(first: list[float], second: list[float]) -> dict[str, float] | None:
        if len(second) == 1:
            second = second * len(first)
        pairs = list(zip(first, second, strict=False))
        return interval([a - b for a, b in pairs]) if pairs else None

    declared = {
        "1. R1-Zero less pretrained, pass@1": (each("zero", "pass@1"), each("base", "pass@1")),
        "1. the same, pass@16": (each("zero", "pass@16"), each("base", "pass@16")),
        "2. cold start and reinforcement less R1-Zero, pass@1": (
            each("cold-rl", "pass@1"),
            each("zero", "pass@1"),
        ),
        "3. dense twin distilled less reinforced, pass@1": (
            each("distilled", "pass@1"),
            each("dense-rl", "pass@1"),
        ),
        "4. R1-Zero with replay less without, pass@1": (
            each("zero", "pass@1"),
            each("unreplayed", "pass@1"),
        ),
        "5. R1-Zero, thought less votes at equal tokens": (
            each("zero", "pass@1"),
            each("zero", "voted"),
        ),
        "5. pretrained, thought less votes at equal tokens": (
            each("base", "pass@1"),
            each("base", "voted"),
        ),
    }
    differences = {name: apart(*sides) for name, sides in declared.items()}
    return {name: told for name, told in differences.items() if told is not None}


def told_of_steps(runs: Path, stage: str) -> dict[str, dict[str, float]]:
    """Return the curves' beginnings and ends, and how sampler and trainer differed throughout."""
    own: list[dict[str, float]] = []
    for seed in SEEDS:
        file = runs / f"{stage}-{seed}/metrics.jsonl"
        if not file.exists():
            continue
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row["step"] > 0 and "reward" in row]
        if not rows:
            continue

        def mean(name: str, part: Sequence[Row]) -> float:
            values = [row[name] for row in part if name in row]
            return statistics.fmean(values) if values else math.nan

        told: dict[str, float] = {}
        for name in ("reward", "right", "answer_tokens", "entropy"):
            told[f"{name}, first {LAST}"] = mean(name, rows[:LAST])
            told[f"{name}, last {LAST}"] = mean(name, rows[-LAST:])
        for name in ("differing_share", "probability_difference"):
            told[name] = mean(name, rows)
        largest = [row["largest_probability_difference"] for row in rows if "entropy" in row]
        told["largest_probability_difference"] = max(largest, default=math.nan)
        violations = [
            max(row["max_violation"].values()) for row in rows if row.get("max_violation")
        ]
        if violations:
            told["max_violation, first"] = statistics.fmean(violations[:LAST])
            told["max_violation, last"] = statistics.fmean(violations[-LAST:])
        own.append({name: value for name, value in told.items() if not math.isnan(value)})
    return {name: interval([told[name] for told in own]) for name in own[0]} if own else {}


# --- as Markdown ----------------------------------------------------------------------------------


def spread(told: dict[str, float], digits: int = 1, times: float = 100) -> str:
    mean = f"{told['mean'] * times:.{digits}f}"
    return mean if math.isnan(told["half"]) else f"{mean} ± {told['half'] * times:.{digits}f}"


def print_stages(summary: dict[str, dict[str, dict[str, float]]]) -> None:
    print("| | pass@1, % | pass@16, % | tokens | thinks, % | at once, % | by vote, % |")
    print("|---|---|---|---|---|---|---|")
    for stage, told in summary.items():
        cells = [
            *(spread(told[name]) for name in ("pass@1", "pass@16")),
            spread(told["tokens"], times=1),
            *(spread(told[name]) for name in ("thinks", "at_once", "voted")),
        ]
        print(f"| {STAGES[stage]} | {' | '.join(cells)} |")
    print("\n| | busiest expert's surplus | bits that experts tell of the task |\n|---|---|---|")
    for stage, told in summary.items():
        if "bits" in told:
            cells = [spread(told[name], 2, 1) for name in ("violation", "bits")]
            print(f"| {STAGES[stage]} | {' | '.join(cells)} |")


def print_levels(found: dict[str, list[Row]]) -> None:
    names = sorted(next(iter(found.values()))[0]["levels"])
    print(f"\n| pass@1 / pass@16, % | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for stage, rows in found.items():
        cells = []
        for level in names:
            both = [
                statistics.fmean(row["levels"][level][name] for row in rows) * 100
                for name in ("pass@1", "pass@16")
            ]
            cells.append(f"{both[0]:.0f} / {both[1]:.0f}")
        print(f"| {STAGES[stage]} | {' | '.join(cells)} |")


def print_comparisons(comparisons: dict[str, dict[str, float]]) -> None:
    print("\n| difference, points | | outcome |\n|---|---|---|")
    for name, told in comparisons.items():
        outcome = "decided" if abs(told["mean"]) > told["half"] else "undecided"
        print(f"| {name} | {spread(told)} | {outcome} |")


def print_steps(curves: dict[str, dict[str, dict[str, float]]]) -> None:
    curves = {stage: told for stage, told in curves.items() if told}
    print(f"\n| | {' | '.join(STAGES[stage] for stage in curves)} |\n|---{'|---' * len(curves)}|")
    for name in next(iter(curves.values()), {}):
        cells = [spread(told[name], 4, 1) if name in told else "" for told in curves.values()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
