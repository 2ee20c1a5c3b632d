"""What it costs the others when a text joins or leaves, beside `serving.py`, which has clients.

    python benchmarks/joining.py --rounds 6

Eight texts of 2,048 tokens lie in a cache of DeepSeek-V2-Lite's shape (27 layers, 2,304 bytes a
token in each). Again and again the oldest leaves and a new one joins, in memory that nobody has
touched at first, later in what others have left. The network around the cache is as small as can
be, so that what is seen is the cache: what is decided and prepared in each step before the network
runs, and how long whole steps take.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from peers import Moescope
from rich.console import Console
from rich.table import Table

from moescope.api import load
from moescope.engine.engine import Engine
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Scheduler
from moescope.engine.sequence import Sequence
from moescope.families import read_config

TEXTS, TOKENS, FRESH = 8, 2048, 3
CONFIG = {
    "model_type": "deepseek_v2",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 27,
    "num_attention_heads": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Joined:
    """Milliseconds of one change of texts.

    Attributes:
        leaves: taking the oldest away, and deciding what is read without it.
        prepared: of each step that reads the new prompt, before the network runs.
        steps: those steps whole.
        between: a step of the eight texts, before.
    """

    leaves: float
    prepared: tuple[float, ...]
    steps: tuple[float, ...]
    between: float


class Changing:
    """Eight texts, of which the oldest leaves as often as one wants."""

    def __init__(self) -> None:
        config = read_config(CONFIG)
        self.engine = Engine(Moescope.native(config, "int8").model, load("tiny").tokenizer)
        slot = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 4
        self.engine.limit_cache(slot * (TOKENS + 128) * (TEXTS + FRESH))
        self.scheduler = Scheduler(self.engine.blocks)
        self._generator = torch.Generator().manual_seed(0)

    def add(self) -> Sequence:
        """Queue a text that begins like no other."""
        ids = torch.randint(320, (TOKENS,), generator=self._generator).tolist()
        params = SamplingParams(max_tokens=2000, ignore_eos=True)
        text = self.engine.sequence(ids, params, request=object())
        self.scheduler.add(text)
        return text

    def step(self) -> tuple[float, float]:
        """One step; returns milliseconds before the network runs, and in all."""
        begun = time.perf_counter()
        with torch.inference_mode():
            chunks = self.scheduler.schedule()
            self.engine.runner.prepare(clean=False)
            prepared = time.perf_counter()
            logits = self.engine.runner.run(chunks)
            self.engine.hand_out(self.scheduler, chunks, logits)
        return (prepared - begun) * 1e3, (time.perf_counter() - begun) * 1e3

    def change(self) -> Joined:
        """Have the oldest text leave, and another join."""
        between = statistics.median(self.step()[1] for _ in range(5))
        oldest = self.scheduler.running[0]
        begun = time.perf_counter()
        oldest.cancelled = True
        self.scheduler.schedule()
        leaves = (time.perf_counter() - begun) * 1e3
        text = self.add()
        steps: list[tuple[float, float]] = []
        while not text.decodes:
            steps.append(self.step())
        prepared, whole = zip(*steps, strict=True)
        return Joined(leaves, prepared, whole, between)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    texts = Changing()
    for _ in range(TEXTS):
        texts.add()
    texts.step()
    while not all(text.decodes for text in texts.scheduler.running):
        texts.step()
    columns = (
        "memory",
        "leaves, ms",
        "joins, ms: most in a step",
        "in all",
        "its steps, whole, ms",
    )
    table = Table(*columns, "a step before", title=f"{TEXTS} texts of {TOKENS:,} tokens")
    for number in range(given.rounds):
        one = texts.change()
        table.add_row(
            "fresh" if number < FRESH else "used before",
            f"{one.leaves:.2f}",
            f"{max(one.prepared):.2f}",
            f"{sum(one.prepared):.2f}",
            ", ".join(f"{step:.0f}" for step in one.steps),
            f"{one.between:.1f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
