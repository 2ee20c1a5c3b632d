"""What routers of its own cost a text: eight in a batch, each steered otherwise, and eight plain.

    python benchmarks/steering.py --rounds 40

The network has DeepSeek-V2-Lite's shape, but fewer layers, on the native kernels in int8. Steps of
both batches take turns. Each steered text has another expert switched off in every layer, so that
it visits as many as a plain one.
"""

import argparse
import statistics
import time

from peers import Moescope
from rich.console import Console
from rich.table import Table

from moescope.api import load
from moescope.engine.engine import Engine
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Scheduler
from moescope.families import read_config
from moescope.model.steering import Steering

TEXTS, TOKENS = 8, 64
CONFIG = {
    "model_type": "deepseek_v2",
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
}


def batch(engine: Engine, steerings: list[Steering | None]) -> Scheduler:
    """Texts that have been read, each of another prompt."""
    scheduler = Scheduler(engine.blocks)
    for at, steering in enumerate(steerings):
        params = SamplingParams(max_tokens=2000, ignore_eos=True, steering=steering)
        ids = [(at * 977 + 31 * place) % CONFIG["vocab_size"] for place in range(TOKENS)]
        scheduler.add(engine.sequence(ids, params, at, request=at))
    while not all(text.decodes for text in scheduler.running) or not scheduler.running:
        engine.step(scheduler)
    return scheduler


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--layers", type=int, default=3)
    given = parser.parse_args()
    config = read_config(CONFIG | {"num_hidden_layers": given.layers})
    engine = Engine(Moescope.native(config, "int8").model, load("tiny").tokenizer)
    sparse = range(1, given.layers)
    others = [Steering(disabled={(layer, at) for layer in sparse}) for at in range(TEXTS)]
    begun = time.perf_counter()
    for steering in others:
        made = engine.steerings.of(steering)
        assert made is not None and made.routers
    ready = (time.perf_counter() - begun) * 1e3 / TEXTS / len(sparse)
    batches = {
        "plain": batch(engine, [None] * TEXTS),
        "each steered otherwise": batch(engine, others),
    }
    taken: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(given.rounds):
        for name, scheduler in batches.items():
            begun = time.perf_counter()
            engine.step(scheduler)
            taken[name].append((time.perf_counter() - begun) * 1e3)
    table = Table("texts", "a step, ms", "range", title=f"{TEXTS} texts, {given.layers} layers")
    for name, times in taken.items():
        median = statistics.median(times)
        table.add_row(name, f"{median:.2f}", f"{min(times):.2f} - {max(times):.2f}")
    Console(width=100).print(table)
    ratios = [b / a for a, b in zip(*taken.values(), strict=True)]
    print(f"steered over plain, step by step: {statistics.median(ratios):.3f}")
    print(f"a steering is made ready in {ready:.2f} ms a layer")


if __name__ == "__main__":
    main()
