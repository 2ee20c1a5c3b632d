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
from moescope.catalog import catalog
from moescope.engine.engine import Engine
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Scheduler
from moescope.model.steering import Steering

TEXTS, TOKENS, VOCAB = 8, 64, 4096


def batch(engine: Engine, steerings: list[Steering | None]) -> Scheduler:
    """Texts that have been read, each of another prompt."""
    scheduler = Scheduler(engine.blocks)
    for at, steering in enumerate(steerings):
        params = SamplingParams(max_tokens=2000, ignore_eos=True, steering=steering)
        ids = [(at * 977 + 31 * place) % VOCAB for place in range(TOKENS)]
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
    shape = {"vocab_size": VOCAB, "num_hidden_layers": given.layers}
    config = catalog()["deepseek-v2-lite"].config.model_copy(update=shape)
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
