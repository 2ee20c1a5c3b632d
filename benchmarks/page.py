"""How fast the page is, in headless Chromium beside its own server.

    python benchmarks/page.py --rounds 7 --json page.json

Measured are the bytes that come over the wire, the first paint, the moment from which the reader
can play and the one when all stations stand, the time from moving the slider of experts per token
until the candidates have changed (after a short prompt, and after a text of some 60 tokens), frames
while text is played, and what a trace of 64 tokens takes.
Chromium paints without a GPU.
"""

import argparse
import gzip
import itertools
import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.table import Table

TEXT = "It is a truth universally acknowledged, that"
GOALS = {
    "bytes_kb": 350,
    "first_paint_s": 0.2,
    "ready_s": 0.8,
    "all_stations_s": 2.0,
    "change_short_ms": 100,
    "change_long_ms": 100,
    "longest_frame_ms": 17,
    "frames_per_second": 60,
    "trace_64_ms": 300,
}

CHANGES = [3, 9, 2, 12, 4, 16, 5, 8, 1]
"""Experts per token, one after the other."""

CHANGE = """async (k) => {
  const shown = () => [...document.querySelectorAll('[data-testid=candidate]')]
    .map((row) => row.dataset.tokenId + row.dataset.probability).join();
  const slider = document.querySelector('[data-testid=top-k]');
  const before = shown();
  const start = performance.now();
  const changed = new Promise((resolve, reject) => {
    const look = () => shown() !== before && (observer.disconnect(), resolve());
    setTimeout(() => reject(new Error(`k = ${k}: the candidates did not change`)), 10000);
    const observer = new MutationObserver(look);
    observer.observe(document.body, { subtree: true, childList: true, attributes: true });
  });
  slider.value = k;
  slider.dispatchEvent(new Event('input', { bubbles: true }));
  await changed;
  return performance.now() - start;
}"""

FRAMES = """async () => {
  const times = [];
  let on = true;
  const tick = (now) => { times.push(now); if (on) requestAnimationFrame(tick); };
  requestAnimationFrame(tick);
  const play = document.querySelector('[data-testid=play]');
  play.click();
  await new Promise((resolve) => setTimeout(resolve, 400));
  while (play.getAttribute('aria-pressed') === 'true') {
    if (times.at(-1) - times[0] > 60000) throw new Error('the text does not end');
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  on = false;
  return times;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("moescope")), "open", arguments.model]
    server = subprocess.Popen(
        [*command, "--no-browser", "--port", str(port)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    server.stdout.readline()  # its address: it answers from now on
    try:
        results = measure(f"http://127.0.0.1:{port}/", arguments.rounds)
    finally:
        server.terminate()
        server.wait()
    report(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def measure(address: str, rounds: int) -> dict[str, list[float]]:
    """Return every measured value of every round, by name as in `GOALS`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        results: dict[str, list[float]] = {"bytes_kb": [bytes_of_page(address) / 1000]}
        loads = [load(browser, address) for _ in range(rounds)]
        for place, name in enumerate(("first_paint_s", "ready_s", "all_stations_s")):
            results[name] = [times[place] for times in loads]
        page = opened(browser, address)
        page.get_by_test_id("prompt").fill(TEXT)
        page.get_by_test_id("reset").click()
        page.wait_for_timeout(800)
        results["change_short_ms"] = [changed(page, k) for k in CHANGES[:rounds]]
        page.get_by_test_id("unsteer").click()
        frames = [played(page) for _ in range(max(2, rounds // 2))]
        results["frames_per_second"] = [rate for rate, _ in frames]
        results["longest_frame_ms"] = [longest for _, longest in frames]
        page.wait_for_timeout(1500)
        results["change_long_ms"] = [changed(page, k) for k in CHANGES[:rounds]]
        browser.close()
    results["trace_64_ms"] = traces(address, rounds)
    return results


def opened(browser: Browser, address: str) -> Page:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}?lang=en")
    page.get_by_test_id("token").first.wait_for()
    page.locator("main[aria-busy=false]").wait_for()
    page.wait_for_timeout(1000)
    return page


def load(browser: Browser, address: str) -> tuple[float, float, float]:
    """Seconds until first paint, a text to play on, and the last station, of a fresh browser."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(f"{address}?lang=en", wait_until="commit")
    page.get_by_test_id("token").first.wait_for()
    ready = page.evaluate("performance.now()")
    page.locator("main[aria-busy=false]").wait_for()
    whole = page.evaluate("performance.now()")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    context.close()
    return paint / 1000, ready / 1000, whole / 1000


def played(page: Page) -> tuple[float, float]:
    """Frames a second while 32 tokens are played, and the longest frame in milliseconds."""
    page.get_by_test_id("reset").click()
    page.wait_for_timeout(800)
    times: list[float] = page.evaluate(FRAMES)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return 1000 * len(gaps) / sum(gaps), max(gaps)


def changed(page: Page, k: int) -> float:
    """Milliseconds from a new number of experts per token until the candidates have changed."""
    taken: float = page.evaluate(CHANGE, k)
    page.wait_for_timeout(1000)
    return taken


def traces(address: str, rounds: int) -> list[float]:
    """Milliseconds that a full trace of 64 tokens takes over HTTP, for texts not seen before."""
    taken: list[float] = []
    for round_ in range(rounds):
        body = {"ids": [0, *range(500 + 100 * round_, 563 + 100 * round_)]}
        start = time.perf_counter()
        answer = ask(address + "api/trace", body)
        taken.append(1000 * (time.perf_counter() - start))
        assert len(answer["steps"]) == 64
    return taken


def ask(url: str, body: dict[str, Any]) -> Any:
    """Post JSON, read JSON."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def bytes_of_page(address: str) -> int:
    """The page's files, packed as a browser asks for them."""

    def fetch(path: str) -> bytes:
        request = urllib.request.Request(address + path, headers={"Accept-Encoding": "gzip"})
        with urllib.request.urlopen(request) as answer:
            return answer.read()

    index = fetch("")
    sizes, known = len(index), set[str]()
    waiting: list[str] = [gzip.decompress(index).decode()]
    while waiting:
        for file in set(re.findall(r"[\w-]+-[\w-]{8}\.(?:js|css)", waiting.pop())) - known:
            known.add(file)
            packed = fetch(f"assets/{file}")
            sizes += len(packed)
            waiting.append(gzip.decompress(packed).decode())
    return sizes


def report(results: dict[str, list[float]]) -> None:
    """Print medians and ranges beside the goals."""
    table = Table("measured", "median", "range", "goal")
    for name, goal in GOALS.items():
        values = results[name]
        span = f"{min(values):.4g} - {max(values):.4g}"
        table.add_row(name, f"{statistics.median(values):.4g}", span, str(goal))
    Console().print(table)


if __name__ == "__main__":
    main()
