"""How `moescope serve` answers many clients at once, beside llama.cpp's `llama-server`.

    python benchmarks/serving.py --llama-server PATH --shape S --rounds 5 --json serving.json
    python benchmarks/serving.py --llama-server PATH --shape L --folder FOLDER

Both serve the same GGUF file of random weights, with as many threads and as many texts at a time,
and are asked in turn within each round, because a shared machine moves from minute to minute: only
ratios inside a round mean anything, and their medians are what is reported. The clients are one
process on the same machine. `llama-server` is built from llama.cpp's source; without it, only ours
is measured.

Three loads, each of prompts that no server has seen before, continued by the likeliest tokens:
one client alone; eight clients who ask again as soon as they are answered; and one who goes on with
a conversation, of a thousand tokens or as many as one says, each turn being all that was said and a
little more; beside it as many tokens that nobody has said yet.
"""

import argparse
import asyncio
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch
from cpu_inference import SHAPES, weight_shapes
from gguf import TokenType
from peers import random_weights
from rich.console import Console
from rich.table import Table

from moescope.config import ModelConfig
from moescope.families import read_config
from moescope.formats.gguf.writer import Vocabulary, write_gguf
from moescope.kernels import cpu

CLIENTS, TURNS = 8, 4
FORMATS = {"int8": "Q8_0", "int4": "Q4_0"}
PEER = "llama-server"
MEASURES = {
    "alone_first_token": "alone: seconds to the first token",
    "alone_rate": "alone: tokens a second",
    "together_first_token": "together: seconds to the first token",
    "together_gap": "together: seconds between tokens, median",
    "together_gap_95": "together: seconds between tokens, 95 %",
    "together_rate": "together: tokens a second of all",
    "turn_first_token": "a turn: seconds to the first token",
    "anew_first_token": "as many tokens anew: seconds to the first token",
}
"""What is measured; of seconds less is better, and ratios are turned so that more is."""


@dataclass(frozen=True)
class Load:
    """Sizes, in tokens, and how many requests eight clients make."""

    alone: tuple[int, int] = (512, 64)
    together: tuple[int, int] = (128, 48)
    requests: int = 16
    conversation: tuple[int, int, int] = (1024, 32, 16)  # begins with, a turn asks, is answered

    @property
    def longest(self) -> int:
        """Tokens that a text may have: 2,048, or what the conversation comes to."""
        begins, asks, is_answered = self.conversation
        return max(2048, begins + TURNS * (asks + is_answered))


@dataclass(frozen=True)
class Answer:
    """When the tokens of one answer came, in seconds since it was asked for, and their text."""

    times: tuple[float, ...]
    text: str


def words(config: ModelConfig) -> Vocabulary:
    """A word for every token, so that each is told at once and can be known by its text."""
    names = [f"Ġw{number}" for number in range(3, config.vocab_size)]
    return Vocabulary(
        tokens=["Ġ", "w", "Ġw", *names],
        merges=["Ġ w"],
        types=[TokenType.NORMAL] * config.vocab_size,
        eos_token_id=0,
    )


class Prompts:
    """Random ids, new ones every time."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(0)

    def draw(self, count: int) -> list[int]:
        """Return `count` of them."""
        return torch.randint(3, self._vocab_size, (count,), generator=self._generator).tolist()


async def ask(client: httpx.AsyncClient, prompt: Sequence[int], tokens: int) -> Answer:
    """Stream a completion."""
    question = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": True}
    question |= {"ignore_eos": True, "logprobs": 0}  # so that every token is told, text or not
    times: list[float] = []
    text = ""
    start = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=question) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                if choice["logprobs"] or choice["finish_reason"] is None:
                    times.append(time.perf_counter() - start)
                text += choice["text"]
    assert len(times) == tokens, f"{len(times)} tokens of {tokens} came"
    return Answer(tuple(times), text)


async def measure(address: str, load: Load, prompts: Prompts) -> dict[str, float]:
    """Put all three loads on a server."""
    # A connection for each request: llama-server now and then ends one that is used again.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        alone = await ask(client, prompts.draw(load.alone[0]), load.alone[1])
        together, seconds = await _together(client, load, prompts)
        turns, length = await _conversation(client, load, prompts)
        anew = await ask(client, prompts.draw(length), 1)
    gaps = sorted(b - a for one in together for a, b in zip(one.times, one.times[1:], strict=False))
    return {
        "alone_first_token": alone.times[0],
        "alone_rate": (len(alone.times) - 1) / (alone.times[-1] - alone.times[0]),
        "together_first_token": statistics.median(one.times[0] for one in together),
        "together_gap": statistics.median(gaps),
        "together_gap_95": gaps[len(gaps) * 95 // 100],
        "together_rate": sum(len(one.times) for one in together) / seconds,
        "turn_first_token": statistics.median(one.times[0] for one in turns),
        "anew_first_token": anew.times[0],
    }


async def _together(
    client: httpx.AsyncClient, load: Load, prompts: Prompts
) -> tuple[list[Answer], float]:
    waiting = [prompts.draw(load.together[0]) for _ in range(load.requests)]
    answers: list[Answer] = []

    async def work() -> None:
        while waiting:
            answers.append(await ask(client, waiting.pop(), load.together[1]))

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return answers, time.perf_counter() - start


async def _conversation(
    client: httpx.AsyncClient, load: Load, prompts: Prompts
) -> tuple[list[Answer], int]:
    """All turns but the first, and the tokens that the middle one of them was asked by."""
    begins, asks, is_answered = load.conversation
    said, answers, lengths = prompts.draw(begins), [], []
    for _ in range(TURNS):
        lengths.append(len(said))
        answers.append(await ask(client, said, is_answered))
        said += [int(number) for number in re.findall(r"w(\d+)", answers[-1].text)]
        said += prompts.draw(asks)
    return answers[1:], sorted(lengths[1:])[(TURNS - 1) // 2]


@contextmanager
def serving(command: list[str], log: Path) -> Iterator[str]:
    """Run a server at a free port while entered; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with (
        log.open("w") as out,
        subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out) as server,
    ):
        try:
            while not _answers(address):
                if server.poll() is not None:
                    raise SystemExit(f"the server ended; {log} says why")
                time.sleep(0.5)
            yield address
        finally:
            server.terminate()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def commands(
    model: Path, weight_format: str, llama_server: Path | None, longest: int
) -> dict[str, list[str]]:
    """How each server is started, but for its port; texts have `longest` tokens at most."""
    ours = [sys.executable, "-c", "from moescope.cli.main import main; main()", "serve", str(model)]
    ours += ["--backend", "cpu", "--quantize", weight_format, "--max-batch", str(CLIENTS)]
    found = {"moescope": ours}
    if llama_server is not None:
        threads, slots = str(cpu.threads()), str(CLIENTS)
        context = str(CLIENTS * longest)
        found[PEER] = [str(llama_server), "-m", str(model), "-t", threads, "-np", slots]
        found[PEER] += ["-c", context]
    return found


def ratios(measured: list[dict[str, dict[str, float]]]) -> dict[str, list[float]]:
    """How many times better ours was within each round: median, least, greatest."""
    found: dict[str, list[float]] = {}
    for key, meaning in MEASURES.items():
        values = [row["moescope"][key] / row[PEER][key] for row in measured]
        if "seconds" in meaning:
            values = [1 / value for value in values]
        found[key] = [statistics.median(values), min(values), max(values)]
    return found


def show(measured: list[dict[str, dict[str, float]]], title: str, console: Console) -> None:
    """Print medians, and ratios with their ranges."""
    table = Table("", *measured[0], "times better", "least-greatest", title=title)
    better = ratios(measured) if PEER in measured[0] else {}
    for key, meaning in MEASURES.items():
        medians = [
            statistics.median(row[server][key] for row in measured) for server in measured[0]
        ]
        cells = [f"{value:,.3g}" for value in medians]
        if key in better:
            middle, least, greatest = better[key]
            cells += [f"{middle:.2f}", f"{least:.2f}-{greatest:.2f}"]
        table.add_row(meaning, *cells)
    console.print(table)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--format", choices=FORMATS, default="int8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--conversation", type=int, default=1024, help="tokens it begins with")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--folder", type=Path, help="where the model is kept from run to run")
    given = parser.parse_args()
    config = read_config(SHAPES[given.shape])
    console = Console(width=140)
    with ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / f"words-{given.shape}-{FORMATS[given.format]}.gguf"
        if not model.exists():
            shapes = weight_shapes(config)
            write_gguf(
                config,
                shapes,
                lambda name: random_weights(shapes[name]),
                model,
                FORMATS[given.format],
                vocabulary=words(config),
            )
        full = Load(conversation=(given.conversation, 32, 16))
        servers = {
            name: stack.enter_context(serving(command, folder / f"{name}.log"))
            for name, command in commands(
                model, given.format, given.llama_server, full.longest
            ).items()
        }
        prompts = Prompts(config.vocab_size)
        warm = Load((64, 4), (16, 4), CLIENTS, (64, 8, 4))
        measured: list[dict[str, dict[str, float]]] = []
        for number in range(given.rounds + 1):
            row: dict[str, dict[str, float]] = {}
            for name, address in servers.items():
                load = full if number else warm
                row[name] = asyncio.run(measure(address, load, prompts))
                told = ", ".join(f"{key} {value:.3g}" for key, value in row[name].items())
                console.print(f"round {number}/{given.rounds} {name}: {told}", style="dim")
            measured += [row] if number else []
    title = f"shape {given.shape}, {given.format}, {CLIENTS} clients, {cpu.threads()} threads"
    show(measured, title, console)
    if given.json is not None:
        result: dict[str, Any] = {"shape": given.shape, "format": given.format, "rounds": measured}
        if given.llama_server is not None:
            result["times_better"] = ratios(measured)
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
