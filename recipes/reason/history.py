"""Put the replayed history into the box: `python recipes/reason/history.py runs/reason`.

Takes the first seed of both reinforcements, and `results.json` of all seeds (`tables.py`).
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from moescope.families import open_config
from moescope.model.costs import count_parameters
from moescope.scope import reasoning
from moescope.scope.saved import rounded

SEED = 0
RUNS = {"zero": "zero", "cold": "cold-rl"}
PATH = ("base", "zero", "cold", "cold-rl", "dense", "dense-rl", "distilled")


def main() -> None:
    runs = Path(sys.argv[1])
    config = open_config(runs / "base/config.json")
    counted = count_parameters(config)
    stages = json.loads((runs / "results.json").read_text(encoding="utf-8"))["stages"]
    first = lines(runs / f"zero-{SEED}/answers.jsonl")[0]["answers"]
    reasoning.ReasoningHistory(
        parameters=counted.total,
        active=counted.active,
        layers=[int(layer) for layer in first[0]["experts"]],
        questions=[
            reasoning.ReasoningQuestion(one["task"], one["level"], one["question"]) for one in first
        ],
        runs=[run_of(runs / f"{folder}-{SEED}", name) for name, folder in RUNS.items()],
        stages=[stage_of(name, stages[name]) for name in PATH if name in stages],
    ).save(reasoning.FILE)
    print(f"{reasoning.FILE}: {reasoning.FILE.stat().st_size:,} bytes")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run_of(run: Path, name: str) -> reasoning.ReasoningRun:
    rows = lines(run / "metrics.jsonl")
    accuracy = {row["step"]: row["accuracy"] for row in rows if "accuracy" in row}
    return reasoning.ReasoningRun(
        name=name,
        seed=SEED,
        steps=[step_of(row) for row in rows if "reward" in row],
        snapshots=[
            reasoning.ReasoningSnapshot(
                kept["step"], accuracy[kept["step"]], [answer_of(one) for one in kept["answers"]]
            )
            for kept in lines(run / "answers.jsonl")
        ],
    )


def step_of(row: dict[str, Any]) -> reasoning.ReasoningStep:
    def told(name: str) -> float | None:
        return rounded(row[name]) if row.get(name) is not None else None

    violations = row.get("max_violation") or {}
    return reasoning.ReasoningStep(
        step=row["step"],
        reward=rounded(row["reward"]),
        right=rounded(row["right"]),
        tokens=rounded(row["answer_tokens"]),
        entropy=told("entropy"),
        differing=told("differing_share"),
        apart=told("probability_difference"),
        violation=rounded(max(violations.values())) if violations else None,
    )


def answer_of(kept: dict[str, Any]) -> reasoning.ReasoningAnswer:
    experts = list(kept["experts"].values())
    return reasoning.ReasoningAnswer(kept["answer"], kept["reward"], kept["tokens"], experts)


def stage_of(name: str, told: dict[str, Any]) -> reasoning.ReasoningStage:
    def estimate(measure: str) -> reasoning.Estimate:
        mean, half = told[measure]["mean"], told[measure]["half"]
        return reasoning.Estimate(rounded(mean), None if math.isnan(half) else rounded(half))

    return reasoning.ReasoningStage(
        name=name,
        seeds=told["pass@1"]["seeds"],
        one=estimate("pass@1"),
        any=estimate("pass@16"),
        tokens=estimate("tokens"),
        voted=estimate("voted"),
    )


if __name__ == "__main__":
    main()
