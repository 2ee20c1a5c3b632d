"""What the page inside `moescope serve` costs those who are being answered.

    python benchmarks/watching.py --model tiny --rounds 5

Four clients are answered at once, likeliest tokens, alone and while pictures of texts of 1,000
tokens, each another, are opened one after the other; in turn, because a shared machine moves. One
more request would take a fifth of the time.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx2 as httpx
from serving import serving

import moescope

CLIENTS, TOKENS, PICTURE = 4, 300, 1000


async def answered(client: httpx.AsyncClient, gaps: list[float]) -> None:
    """Ask for a text, and note the seconds between its tokens."""
    asked = {"prompt": "the moon", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    last: float | None = None
    async with client.stream("POST", "/v1/completions", json=asked | {"stream": True}) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                now = time.perf_counter()
                if last is not None:
                    gaps.append(now - last)
                last = now


async def pictures(client: httpx.AsyncClient, took: list[float]) -> None:
    """Open one after the other; what is known already is none of them."""
    number = 0
    while True:
        number += 1
        begun = time.perf_counter()
        ids = [(7 * number + at * at) % 2000 + 10 for at in range(PICTURE)]
        (await client.post("/page/api/trace", json={"ids": ids})).raise_for_status()
        took.append(time.perf_counter() - begun)


async def measure(address: str, *, watched: bool) -> tuple[float, list[float], list[float]]:
    """Return tokens a second, the gaps between tokens in order, and seconds of each picture."""
    gaps, took = list[float](), list[float]()
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        watching = asyncio.create_task(pictures(client, took)) if watched else None
        await asyncio.sleep(0.3 * watched)
        begun = time.perf_counter()
        await asyncio.gather(*(answered(client, gaps) for _ in range(CLIENTS)))
        rate = CLIENTS * TOKENS / (time.perf_counter() - begun)
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    return rate, sorted(gaps), took


async def compare(address: str, rounds: int) -> None:
    """Print each round, and the medians of what changes."""
    await measure(address, watched=False)  # memory is touched, and kernels are chosen
    rates, longest, done = list[float](), list[tuple[float, float]](), list[float]()
    for number in range(rounds):
        alone, quiet, _ = await measure(address, watched=False)
        rate, gaps, took = await measure(address, watched=True)
        rates.append(rate / alone)
        longest.append((quiet[-1], gaps[-1]))
        done += took
        print(
            f"round {number + 1}: {alone:.0f} tokens a second alone, {rate:.0f} beside pictures; "
            f"gap 99 % {1000 * quiet[int(0.99 * len(quiet))]:.0f} and "
            f"{1000 * gaps[int(0.99 * len(gaps))]:.0f} ms, longest {1000 * quiet[-1]:.0f} and "
            f"{1000 * gaps[-1]:.0f} ms; {len(took)} pictures",
            flush=True,
        )
    print(
        f"tokens a second beside pictures: {statistics.median(rates):.2f} of alone "
        f"({min(rates):.2f}-{max(rates):.2f}); longest gap "
        f"{1000 * statistics.median(gap for gap, _ in longest):.0f} ms alone, "
        f"{1000 * statistics.median(gap for _, gap in longest):.0f} ms beside; a picture "
        f"{statistics.median(done):.1f} s ({min(done):.1f}-{max(done):.1f})"
    )


def main() -> None:
    """Read the arguments, serve, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"moescope {moescope.__version__}, {options.model}, {options.rounds} rounds")
    script = "from moescope.cli.main import main; main()"
    command = [sys.executable, "-c", script, "serve", options.model]
    with tempfile.TemporaryDirectory() as folder, serving(command, Path(folder) / "log") as address:
        asyncio.run(compare(address, options.rounds))


if __name__ == "__main__":
    main()
