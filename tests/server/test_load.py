"""Sixty-four clients at once, a third of whom leave: every answer is what it is alone.

`LOAD_SECONDS` says for how long, `LOAD_MODEL` of what model; `make load` takes five minutes.
"""

import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from served import kilobytes, nothing_runs, process, said, save_tool_caller

from moescope.api import Model

SECONDS = float(os.environ.get("LOAD_SECONDS", "20"))
MODEL = os.environ.get("LOAD_MODEL")
CLIENTS, LEAVE = 64, 1 / 3
WARM = 0.2
"""The share of the time in which memory comes to what it needs."""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "北京"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
FORMED = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
PROMPTS = ("the moon", "is it frost?", "床前明月光", "before my bed " * 12, "moon, moon, moon")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Question:
    """Something to ask, always with one answer."""

    path: str
    asked: dict[str, Any]


def questions() -> list[Question]:
    """Texts, chats, forms and calls, whole and streamed, likeliest and drawn."""
    made: list[Question] = []
    for number, prompt in enumerate(PROMPTS):
        drawn = {"temperature": 0.8, "seed": number, "top_p": 0.9, "repetition_penalty": 1.1}
        for stream in (False, True):
            how: dict[str, Any] = {"model": "small", "stream": stream, "max_tokens": 24}
            told = how | {"messages": [{"role": "user", "content": prompt}]}
            chat = "/v1/chat/completions"
            made += [
                Question("/v1/completions", how | {"prompt": prompt, "temperature": 0}),
                Question("/v1/completions", how | {"prompt": prompt, "n": 2} | drawn),
                Question(chat, told | drawn),
                Question(chat, told | {"response_format": FORMED, "max_tokens": 200} | drawn),
                Question(
                    chat,
                    told
                    | {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200}
                    | {"parallel_tool_calls": False, "temperature": 0},
                ),
            ]
    return made


@dataclass
class Seen:
    """What came of all requests.

    Attributes:
        whole: answers that ended.
        left: clients who did not wait for the end.
        wrong: what differed from the answer alone.
        sizes: kB of the server's memory, now and then, once it is warm.
        times: seconds of whole answers.
    """

    whole: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list[str])
    sizes: list[int] = field(default_factory=list[int])
    times: list[float] = field(default_factory=list[float])


async def parts(client: httpx2.AsyncClient, question: Question) -> AsyncIterator[dict[str, Any]]:
    """Yield an answer's events; one that is whole is a single one."""
    async with client.stream("POST", question.path, json=question.asked) as response:
        if response.status_code != 200:
            raise AssertionError(f"status {response.status_code}: {await response.aread()!r}")
        if not question.asked["stream"]:
            yield json.loads(await response.aread())
            return
        ended = False
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])
            ended = ended or line == "data: [DONE]"
        assert ended


def add(texts: dict[tuple[int, str], str], event: dict[str, Any]) -> None:
    """Add to the texts of an answer, by choice and field, what an event says."""
    assert "error" not in event, event
    for choice in event["choices"]:
        held = choice.get("delta") or choice.get("message") or choice
        found = {name: held.get(name) for name in ("text", "content", "reasoning_content")}
        for call in held.get("tool_calls") or ():
            function = call["function"]
            found["name"] = (found.get("name") or "") + (function.get("name") or "")
            found["arguments"] = (found.get("arguments") or "") + (function.get("arguments") or "")
        found["ends"] = choice.get("finish_reason")
        for name, text in found.items():
            if text:
                at = choice["index"], name
                texts[at] = texts.get(at, "") + text


async def answer(client: httpx2.AsyncClient, question: Question) -> dict[tuple[int, str], str]:
    texts: dict[tuple[int, str], str] = {}
    async for event in parts(client, question):
        add(texts, event)
    return texts


async def loaded(url: str, pid: int, seconds: float) -> Seen:
    seen, asked = Seen(), questions()
    limits = httpx2.Limits(max_connections=CLIENTS + 1)
    async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        alone = [await answer(client, question) for question in asked]
        begun = time.monotonic()

        async def work(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() - begun < seconds:
                at = chance.randrange(len(asked))
                start = time.monotonic()
                try:
                    if chance.random() < LEAVE:
                        await leave(client, asked[at], alone[at], chance)
                        seen.left += 1
                        continue
                    found = await answer(client, asked[at])
                except Exception as error:
                    seen.wrong.append(f"{asked[at]}: {type(error).__name__} {error}")
                    continue
                seen.whole += 1
                seen.times.append(time.monotonic() - start)
                if found != alone[at]:
                    seen.wrong.append(f"{asked[at]}: {found}, alone {alone[at]}")

        async def watch() -> None:
            await asyncio.sleep(WARM * seconds)
            while time.monotonic() - begun < seconds:
                seen.sizes.append(kilobytes(pid))
                await asyncio.sleep(1)

        await asyncio.gather(watch(), *(work(number) for number in range(CLIENTS)))
        again = [await answer(client, question) for question in asked]
    seen.wrong += [f"afterwards: {a}, {b}" for a, b in zip(alone, again, strict=True) if a != b]
    return seen


async def leave(
    client: httpx2.AsyncClient,
    question: Question,
    alone: dict[tuple[int, str], str],
    chance: random.Random,
) -> None:
    """Hang up: before anything has come, or after some of it, which must be right so far."""
    if not question.asked["stream"]:
        asking = asyncio.create_task(answer(client, question))
        await asyncio.sleep(chance.random())
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        return
    texts: dict[tuple[int, str], str] = {}
    left, stream = chance.randrange(20), parts(client, question)
    async for event in stream:
        add(texts, event)
        left -= 1
        if left < 0:
            break
    await stream.aclose()
    for at, text in texts.items():
        assert alone.get(at, "").startswith(text), (at, text, alone)


@pytest.fixture(scope="module")
def home(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("load") / "small"
    save_tool_caller(model, home, positions=1024)
    yield MODEL or str(home)


def test_many_clients_get_what_each_gets_alone(home: str) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    options = (
        "--name",
        "small",
        "--cache-memory",
        "0.02",
        "--backend",
        "cpu",
        "--quantize",
        "int8",
    )
    with process(home, *options) as (server, port):
        seen = asyncio.run(loaded(f"http://127.0.0.1:{port}", server.pid, SECONDS))
        nothing_runs(port)
        print(
            f"{seen.whole} answers, {seen.left} left, {len(seen.wrong)} wrong; "
            f"median {statistics.median(seen.times):.2f} s; "
            f"RSS in kB {seen.sizes[:: max(1, len(seen.sizes) // 12)]}"
        )
        assert not seen.wrong, seen.wrong[:3]
        assert seen.whole and seen.left
        if SECONDS >= 60:  # a server's first seconds say nothing of growth
            assert max(seen.sizes) < 1.05 * seen.sizes[0], seen.sizes
        assert said(server) == ""
