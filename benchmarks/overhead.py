"""What a greedy token of a small model takes beside the native kernels' own time.

    python benchmarks/overhead.py [--rounds 5] [--tokens 400]

`tiny` writes behind a prompt of 64 tokens through engine and scheduler, as `moescope generate` has
it. The time that its calls into the extension take is the kernels'; the rest is the program's
around them, looking at the clock among it. Medians of a round's tokens.
"""

import argparse
import statistics
from time import perf_counter
from typing import Any

import torch
from peers import Moescope

from moescope import load
from moescope.kernels.cpu import extension

PROMPT = 64
WARM_UP = 20


class Timed:
    """Stands for something of the extension, and sums how long its calls take, in seconds."""

    spent = 0.0

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._of, name)
        return Timed(found) if callable(found) else found

    def __call__(self, *arguments: Any) -> Any:
        plain = [_plain(argument) for argument in arguments]
        start = perf_counter()
        result = self._of(*plain)
        Timed.spent += perf_counter() - start
        return Timed(result) if type(result).__module__ == extension.native.__name__ else result


def _plain(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_plain(one) for one in argument]
    return argument._of if isinstance(argument, Timed) else argument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=400)
    arguments = parser.parse_args()
    extension.native = Timed(extension.native)  # type: ignore[assignment]
    model = load("tiny", backend="cpu").network
    runner = Moescope(model)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT), generator=generator)
    print("microseconds a token: all, the kernels' own, around them")
    for _ in range(arguments.rounds):
        runner.read(prompt)
        for _ in range(WARM_UP):
            runner.step()
        print("{:.0f} {:.0f} {:.0f}".format(*round_of(runner, arguments.tokens)))


def round_of(runner: Moescope, tokens: int) -> tuple[float, float, float]:
    """Median microseconds of a token: all, within the extension, and without it."""
    whole: list[float] = []
    within: list[float] = []
    for _ in range(tokens):
        Timed.spent, start = 0.0, perf_counter()
        runner.step()
        whole.append((perf_counter() - start) * 1e6)
        within.append(Timed.spent * 1e6)
    around = statistics.median(a - b for a, b in zip(whole, within, strict=True))
    return statistics.median(whole), statistics.median(within), around


if __name__ == "__main__":
    with torch.inference_mode():
        main()
