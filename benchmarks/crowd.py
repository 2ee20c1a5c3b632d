"""How long one waits for a first token while somebody else asks for many texts.

    python benchmarks/crowd.py --rounds 5

A request of 128 texts of 300 tokens, read and made eight at a time on shape S in 8 bits; another
asks for one text as it comes, or in the midst of it. What it waits is divided by what it waits
where nobody else asks; medians and the longest of all rounds.
"""

import argparse
import statistics
import time
from queue import Queue

import torch
from cpu_inference import SHAPES
from peers import Moescope
from rich.console import Console
from rich.table import Table

from moescope.engine.engine import Engine
from moescope.engine.sampling import SamplingParams
from moescope.engine.sequence import Sequence, Token
from moescope.families import read_config
from moescope.server.model_thread import ModelThread

TEXTS, TOKENS, PLACES, CACHE_BYTES = 128, 300, 8, 2**30
PROMPTS = (16, 128, 512)
MOMENTS = (0.0, 0.02, 0.5, 1.0, 1.5)
"""Seconds after the crowd came."""


class Asking:
    """Asks for texts of prompts that begin like no other."""

    def __init__(self) -> None:
        model = Moescope.native(read_config(SHAPES["S"]), "int8")
        self.thread = ModelThread(Engine(model.model, model.tokenizer), PLACES, CACHE_BYTES)
        self._generator = torch.Generator().manual_seed(0)

    def crowd(self, prompt_tokens: int) -> list[Sequence]:
        """Ask for many texts at once."""
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        return [
            self.thread.submit(self._prompt(prompt_tokens), params, lambda _: None, 0, "crowd")
            for _ in range(TEXTS)
        ]

    def first_token(self, prompt_tokens: int) -> float:
        """Ask for one text of a token; return the seconds until it comes."""
        told: Queue[Token | Exception] = Queue()
        prompt, params = self._prompt(prompt_tokens), SamplingParams(max_tokens=1)
        begun = time.perf_counter()
        self.thread.submit(prompt, params, told.put)
        if isinstance(event := told.get(), Exception):
            raise event
        return time.perf_counter() - begun

    def leave(self, texts: list[Sequence]) -> None:
        """Have texts end; wait until they have."""
        for text in texts:
            self.thread.cancel(text)
        while self.thread.held_bytes:
            self.first_token(1)

    def _prompt(self, tokens: int) -> list[int]:
        return torch.randint(3, 300, (tokens,), generator=self._generator).tolist()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    asking = Asking()
    for tokens in PROMPTS:
        asking.first_token(tokens)
    table = Table("the crowd's prompts", "the other's", "alone, ms", "after, s", "ms", "times")
    for crowd_tokens in PROMPTS[:2]:
        for tokens in PROMPTS:
            alone = statistics.median(asking.first_token(tokens) for _ in range(9))
            for moment in MOMENTS:
                waited: list[float] = []
                for _ in range(given.rounds):
                    texts = asking.crowd(crowd_tokens)
                    time.sleep(moment)
                    waited.append(asking.first_token(tokens))
                    asking.leave(texts)
                times = sorted(one / alone for one in waited)
                table.add_row(
                    str(crowd_tokens),
                    str(tokens),
                    f"{alone * 1e3:.1f}",
                    f"{moment:g}",
                    f"{statistics.median(waited) * 1e3:.1f}",
                    f"{statistics.median(times):.2f} ({times[0]:.2f} - {times[-1]:.2f})",
                )
    Console(width=100).print(table)
    asking.thread.close()


if __name__ == "__main__":
    main()
