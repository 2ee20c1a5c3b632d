"""How a server of OpenAI's API bears load: times to first tokens, between tokens, tokens a second.

Numbers go by the names that vLLM's `bench serve` gives them. Nothing of moescope computes here.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from moescope.errors import UserError

SECONDS_PER_ANSWER = 600.0
WORDS = (
    "the",
    "moon",
    "river",
    "of",
    "stone",
    "and",
    "a",
    "light",
    "in",
    "seven",
    "winter",
    "hand",
)
PROBE_WORDS = 50
"""By which the tokens of a word are learned, from what the server says of its prompt."""


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Attributes:
        max_concurrency: requests at a time.
        num_prompts: requests in all; None for as many as fit into `duration`.
        duration: seconds in which requests begin; None for no limit.
        random_input_len: tokens of a prompt, as near as whole words come.
        random_output_len: tokens of an answer at most.
        hang_up: the share of clients who leave before their answer ends.
        ignore_eos: whether answers go on to their full length, where the server knows how.
        temperature: of answers.
        seed: of prompts, and of who hangs up.
    """

    max_concurrency: int = 8
    num_prompts: int | None = 64
    duration: float | None = None
    random_input_len: int = 128
    random_output_len: int = 64
    hang_up: float = 0.0
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Answer:
    """What came of one request.

    Attributes:
        asked: when, in seconds of `time.perf_counter`.
        pieces: when each piece of the answer came.
        prompt_tokens: as the server counts them; 0 if it does not.
        output_tokens: likewise; the number of pieces if it does not.
        hung_up: whether the client left.
        error: what went wrong, "" if nothing did.
    """

    asked: float
    pieces: list[float] = field(default_factory=list[float])
    prompt_tokens: int = 0
    output_tokens: int = 0
    hung_up: bool = False
    error: str = ""


@dataclass(frozen=True)
class Server:
    """Where to ask.

    Attributes:
        url: of the server, with or without `/v1`.
        endpoint: `/v1/completions` or `/v1/chat/completions`.
        model: as the server calls it; None for the first of its list.
        api_key: to be sent; None for none.
    """

    url: str
    endpoint: str = "/v1/completions"
    model: str | None = None
    api_key: str | None = None

    @property
    def is_chat(self) -> bool:
        """Whether conversations are asked for, not texts."""
        return self.endpoint.rstrip("/").endswith("/chat/completions")

    def client(self, connections: int) -> httpx2.AsyncClient:
        """Open connections to it."""
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        base = self.url.rstrip("/").removesuffix("/v1")
        timeout = httpx2.Timeout(SECONDS_PER_ANSWER, connect=10.0)
        return httpx2.AsyncClient(base_url=base, headers=headers, limits=limits, timeout=timeout)


def put(load: Load, server: Server, tell: Callable[[int, int], None]) -> dict[str, Any]:
    """Put a load on a server and return its numbers, by vLLM's names.

    Args:
        load: what is asked.
        server: where.
        tell: called with (done, in all), of requests or seconds.

    Raises:
        UserError: nobody answers there, or not as OpenAI's API does.
    """
    return asyncio.run(_put(load, server, tell))


async def _put(load: Load, server: Server, tell: Callable[[int, int], None]) -> dict[str, Any]:
    async with server.client(load.max_concurrency + 1) as client:
        model = server.model or await _first_model(client)
        source = random.Random(load.seed)
        probe = await _ask(client, server, model, _words(source, PROBE_WORDS), load, tokens=1)
        if probe.error:
            raise UserError(f"the server refuses to answer ({probe.error}); mend that first")
        per_word = (probe.prompt_tokens or PROBE_WORDS) / PROBE_WORDS
        words = max(1, round(load.random_input_len / per_word))
        begun = time.perf_counter()
        answers: list[Answer] = []

        def more() -> bool:
            left = load.num_prompts is None or asked < load.num_prompts
            in_time = load.duration is None or time.perf_counter() - begun < load.duration
            return left and in_time

        asked = 0

        async def work() -> None:
            nonlocal asked
            while more():
                asked += 1
                leaves = source.random() < load.hang_up
                after = source.randrange(1, max(2, load.random_output_len)) if leaves else None
                prompt = _words(source, words)
                answers.append(await _ask(client, server, model, prompt, load, leave_after=after))
                if load.num_prompts is not None:
                    tell(len(answers), load.num_prompts)
                elif load.duration is not None:
                    passed = min(time.perf_counter() - begun, load.duration)
                    tell(int(passed), int(load.duration))

        await asyncio.gather(*(work() for _ in range(load.max_concurrency)))
        return {"model": model, **numbers(answers, time.perf_counter() - begun)}


def _words(source: random.Random, count: int) -> str:
    """A prompt like no other."""
    return f"{source.getrandbits(40):x} " + " ".join(source.choices(WORDS, k=max(1, count - 1)))


async def _first_model(client: httpx2.AsyncClient) -> str:
    try:
        answer = await client.get("/v1/models")
    except (httpx2.TransportError, httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise UserError(
            f"no server answers at {client.base_url} ({error or type(error).__name__}); start one, "
            "as with `moescope serve`, or correct the address"
        ) from error
    if answer.status_code == 401:
        raise UserError("the server wants a key; give it in MOESCOPE_API_KEY or with --api-key")
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{client.base_url} lists no models as OpenAI's API does (status "
            f"{answer.status_code}); correct the address, or name one with --model"
        ) from error


async def _ask(
    client: httpx2.AsyncClient,
    server: Server,
    model: str,
    prompt: str,
    load: Load,
    *,
    tokens: int | None = None,
    leave_after: int | None = None,
) -> Answer:
    """Ask once; leave after so many pieces, if told to."""
    question: dict[str, Any] = {
        "model": model,
        "max_tokens": tokens or load.random_output_len,
        "temperature": load.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.ignore_eos:
        question["ignore_eos"] = True
    if server.is_chat:
        question["messages"] = [{"role": "user", "content": prompt}]
    else:
        question["prompt"] = prompt
    answer = Answer(time.perf_counter())
    try:
        async with client.stream("POST", server.endpoint, json=question) as response:
            if response.status_code != 200:
                told = (await response.aread()).decode(errors="replace")
                answer.error = f"status {response.status_code}: {' '.join(told.split())[:200]}"
                return answer
            async for event in _events(response):
                _note(answer, event)
                if leave_after is not None and len(answer.pieces) >= leave_after:
                    answer.hung_up = True
                    return answer
    except (httpx2.HTTPError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:200]
    if not answer.error and not answer.pieces and not answer.output_tokens:
        answer.error = "the answer had no tokens"
    answer.output_tokens = answer.output_tokens or len(answer.pieces)
    return answer


async def _events(response: httpx2.Response) -> AsyncIterator[Any]:
    async for line in response.aiter_lines():
        if line.startswith("data:") and line[5:].strip() != "[DONE]":
            yield json.loads(line[5:])


def _note(answer: Answer, event: Any) -> None:
    """Take what an event says of an answer."""
    if event.get("error"):
        answer.error = str(event["error"])[:200]
    usage = event.get("usage") or {}
    answer.prompt_tokens = usage.get("prompt_tokens") or answer.prompt_tokens
    answer.output_tokens = usage.get("completion_tokens") or answer.output_tokens
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        told = choice.get("text") or delta.get("content") or delta.get("tool_calls")
        if told or delta.get("reasoning_content") or delta.get("reasoning"):
            answer.pieces.append(time.perf_counter())


def numbers(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """What the answers say together, by vLLM's names; times are milliseconds.

    Who hung up counts for first tokens and gaps, and not for whole answers.
    """
    whole = [one for one in answers if not one.error and not one.hung_up]
    begun = [one for one in answers if not one.error and one.pieces]
    made = sum(one.output_tokens or len(one.pieces) for one in begun)
    read = sum(one.prompt_tokens for one in whole)
    gaps = [b - a for one in begun for a, b in zip(one.pieces, one.pieces[1:], strict=False)]
    each = [
        (one.pieces[-1] - one.pieces[0]) / (one.output_tokens - 1)
        for one in whole
        if one.output_tokens > 1
    ]
    told: dict[str, Any] = {
        "duration": seconds,
        "completed": len(whole),
        "hung_up": sum(one.hung_up for one in answers),
        "failed": sum(bool(one.error) for one in answers),
        "errors": sorted({one.error for one in answers if one.error})[:10],
        "total_input_tokens": read,
        "total_output_tokens": made,
        "request_throughput": len(whole) / seconds,
        "output_throughput": made / seconds,
        "total_token_throughput": (read + made) / seconds,
    }
    times = {
        "ttft": [one.pieces[0] - one.asked for one in begun],
        "tpot": each,
        "itl": gaps,
        "e2el": [one.pieces[-1] - one.asked for one in whole],
    }
    for name, values in times.items():
        told |= {f"{how}_{name}_ms": of(values) for how, of in _SUMMARIES.items()}
    return told


def _percentile(values: Sequence[float], share: float) -> float | None:
    """In milliseconds, between the two nearest, as numpy has it; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = ordered[int(at)]
    return 1e3 * (low + (ordered[min(int(at) + 1, len(ordered) - 1)] - low) * (at - int(at)))


_SUMMARIES: dict[str, Callable[[Sequence[float]], float | None]] = {
    "mean": lambda values: 1e3 * statistics.fmean(values) if values else None,
    "median": lambda values: _percentile(values, 0.5),
    "p99": lambda values: _percentile(values, 0.99),
}
