"""Two working trees of moescope in turns, on one shape: is the newer one slower?

Each tree runs in a process of its own, which waits while the other works; turns of a fraction of
a second alternate, so that a machine whose speed changes within seconds changes for both. What is
told is the median over pairs of turns, and the range that a bootstrap of the pairs gives it.

    git worktree add ../before COMMIT && (cd ../before && python csrc/build.py)
    python benchmarks/two_trees.py ../before . --shape S --engines int8,int4
    python benchmarks/two_trees.py ../before . --shape G --engines gguf/G-MXFP4_MOE.gguf

An engine that ends in `.gguf` is a file of the shape, as `cpu_inference.py --gguf-folder` writes
it.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MEASURES = ("decode", "batch_decode", "prefill")
BOOTSTRAPS = 2000


class Tree:
    """The process of one working tree, with an engine that is ready."""

    def __init__(self, root: Path, shape: str, engine: str, context: int) -> None:
        self.root = root
        places = os.pathsep.join(str(root / part) for part in ("src", "benchmarks"))
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--work", shape, engine, str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": places},
        )
        self._answer()

    def take(self, measure: str) -> float:
        """Return the tokens per second of one turn."""
        assert self.process.stdin is not None
        print(measure, file=self.process.stdin, flush=True)
        return self._answer()

    def end(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()

    def _answer(self) -> float:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.root} has ended")
        return json.loads(line)


def work(shape: str, engine: str, context: str) -> None:
    """Make an engine of the tree that is on the path, then take turns as they are asked for."""
    import torch
    from cpu_inference import SHAPES
    from peers import Moescope

    try:
        from moescope.families import read_config
    except ImportError:  # trees before families had a place of their own
        from moescope.config import ModelConfig

        read_config = ModelConfig.from_dict
    config = read_config(SHAPES[shape])
    file = engine.endswith(".gguf")
    runner = Moescope.file(Path(engine)) if file else Moescope.native(config, engine)
    chance = torch.Generator().manual_seed(0)
    prompts = torch.randint(config.vocab_size, (8, int(context)), generator=chance)
    read = max(512, int(context))
    steps = 32 if shape == "S" else 8
    rows = {"decode": 1, "batch_decode": 8}
    with torch.inference_mode():
        runner.read(prompts[:, :128])
        print(0, flush=True)
        for line in sys.stdin:
            measure = line.strip()
            if measure == "prefill":
                start = time.perf_counter()
                runner.read(prompts.reshape(1, -1)[:, :read])
                tokens = read
            else:
                runner.read(prompts[: rows[measure]])
                runner.step()
                start = time.perf_counter()
                for _ in range(steps):
                    runner.step()
                tokens = rows[measure] * steps
            print(tokens / (time.perf_counter() - start), flush=True)


def compare(trees: list[Tree], measure: str, turns: int) -> dict[str, Any]:
    """Let both trees take turns, each as often first."""
    rates: list[list[float]] = [[], []]
    for turn in range(turns):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            rates[side].append(trees[side].take(measure))
    ratios = [after / before for before, after in zip(*rates, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=turns)) for _ in range(BOOTSTRAPS))
    return {
        "before": statistics.median(rates[0]),
        "after": statistics.median(rates[1]),
        "ratio": statistics.median(ratios),
        "low": medians[BOOTSTRAPS // 40],
        "high": medians[-BOOTSTRAPS // 40],
    }


def main() -> None:
    """Compare two trees."""
    from cpu_inference import SHAPES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--engines", default="int8,int4")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--context", type=int, default=128, help="tokens before what is written")
    parser.add_argument("--measures", default=",".join(MEASURES))
    arguments = parser.parse_args()
    for engine in arguments.engines.split(","):
        roots = (arguments.before.resolve(), arguments.after.resolve())
        trees = [Tree(root, arguments.shape, engine, arguments.context) for root in roots]
        for measure in arguments.measures.split(","):
            found = compare(trees, measure, arguments.turns)
            print(
                f"{arguments.shape} {engine:5} {measure:13}"
                f" {found['before']:9,.1f} -> {found['after']:9,.1f} tokens/s, "
                f"{found['ratio']:.3f} ({found['low']:.3f} - {found['high']:.3f})",
                flush=True,
            )
        for tree in trees:
            tree.end()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        main()
