"""The same training on one, two and four processes: how far apart are the losses, step by step?

    python benchmarks/parallel_losses.py --json parallel.json
    python benchmarks/parallel_losses.py --routers noaux_tc --steps 50 --data my-text

Each router learns `recipes/smoke.toml` in float32 with AdamW, on each placement; torchrun starts
the processes, which talk over gloo. "Loads from 7" says that in step 7 first an expert had another
number of tokens than with one process: one that lay between two experts has fallen to the other,
by the last bits of a sum. Processes share the machine's cores, so no time is measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moescope.model.routing import ROUTERS
from moescope.training import trainer
from moescope.training.config import ParallelConfig, TrainConfig
from moescope.training.kinds import make_kind
from moescope.training.parallel.ranks import joined
from moescope.training.text import with_special_ids

ROOT = Path(__file__).parents[1]
PLACEMENTS = ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4))
"""Ranks of `data` and `expert`; the first is one process by itself."""
MODEL: dict[str, dict[str, Any]] = {
    "noaux_tc": {"n_group": 4, "topk_group": 2},
    "group_limited_greedy": {"n_group": 2, "topk_group": 1},
}
"""What a router has beside its name; group by group, experts lie on ranks."""
TRAINING = {"dtype": "float32", "optimizer": "adamw", "batch_size": 16, "micro_batch_size": 8}
BALANCE = {"expert_aux": 0.01, "sequence_aux": 0.0, "bias_update_speed": 0.01}


def learn(arguments: argparse.Namespace, data: int, expert: int, out: Path) -> None:
    """Train all routers one after another, as one of so many processes."""
    torch.set_num_threads(1)
    trainer.measure_gemm_peak = lambda *_: 1.0  # the rate of this machine matters to nothing here
    parallel = {"data": data, "expert": expert}
    with joined(ParallelConfig(**parallel)) as ranks:
        for router in arguments.routers:
            tables = {
                "model": {"topk_method": router, **MODEL.get(router, {})},
                "data": {"source": arguments.data},
                "training": {**TRAINING, "steps": arguments.steps},
                "balance": BALANCE,
                "checkpoints": {"every": 0},
                "parallel": parallel,
            }
            config = TrainConfig.from_file(ROOT / "recipes" / "smoke.toml", tables)
            folder = out / router
            kind = ranks.first_then_others(
                lambda: make_kind(config, folder, lambda _: None, ranks)  # noqa: B023
            )
            model = with_special_ids(config.model, kind.tokenizer)
            config = config.model_copy(update={"model": model})
            trainer.Trainer(config, folder, kind, ranks).run(Console(quiet=True))


def learned(arguments: list[str], data: int, expert: int, routers: list[str]) -> dict[str, Any]:
    """Start processes that learn; return each router's logged steps."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable]
        if data * expert > 1:
            line += ["-m", "torch.distributed.run", "--standalone"]
            line += ["--nproc-per-node", str(data * expert)]
        line += [__file__, *arguments, "--rank-of", f"{data},{expert}", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(line, env=environment, stderr=subprocess.PIPE, text=True)
        if ended.returncode != 0:
            sys.exit(ended.stderr)
        return {
            router: [
                json.loads(row)
                for row in (Path(folder) / router / "metrics.jsonl").read_text().splitlines()
            ]
            for router in routers
        }


def compared(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """Say how far apart losses of the same step lie at most, and when an expert's load differs."""
    pairs = list(zip(one, other, strict=True))
    far = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)
    loads = ("max_violation", "experts_per_token", "load")
    steps = [a["step"] for a, b in pairs if any(a.get(n) != b.get(n) for n in loads)]
    return f"{far:.1e}" + (f" (loads from {steps[0]})" if steps else "")


def main() -> None:
    """Train on every placement, then draw the losses beside those of one process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--routers", type=lambda text: text.split(","), default=list(ROUTERS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--data", default=str(ROOT / "src" / "moescope" / "model"), help="text")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-of", nargs=2, metavar=("DATA,EXPERT", "OUT"), help="internal")
    arguments = parser.parse_args()
    if arguments.rank_of:
        data, expert = map(int, arguments.rank_of[0].split(","))
        learn(arguments, data, expert, Path(arguments.rank_of[1]))
        return
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for data, expert in PLACEMENTS:
        found[f"{data} x {expert}"] = learned(sys.argv[1:], data, expert, arguments.routers)
    alone, *others = found
    console = Console()
    for router in arguments.routers:
        table = Table("step", *found, title=f"{router}: loss by placement, data x expert")
        for step in range(arguments.steps):
            row = (f"{made[router][step]['loss']:.7f}" for made in found.values())
            table.add_row(str(step + 1), *row)
        console.print(table)
    table = Table("router", *others, title="largest difference of a step's loss from one process's")
    for router in arguments.routers:
        table.add_row(
            router, *(compared(found[name][router], found[alone][router]) for name in others)
        )
    console.print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
