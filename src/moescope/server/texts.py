"""The texts that one request asks for, from the model's thread to the event loop."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from moescope.config import ModelConfig
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import EXPECTED_TOKENS
from moescope.engine.sequence import Sequence, Token
from moescope.errors import UserError
from moescope.server.metrics import Metrics
from moescope.server.model_thread import MAX_WAITING, ModelThread
from moescope.server.schema import WatchedState
from moescope.server.traffic import Traffic

MAX_TEXTS = 128
"""That one request may ask for."""

MAX_QUEUED_TOKENS = MAX_WAITING // 2
"""To be read or made, that the texts of one request may have: others find a place beside them."""

MAX_TOLD = 1_000_000
"""Numbers that one request may ask for about the tokens of its prompts."""


@dataclass(frozen=True)
class Arrival:
    """Where a request came in, and when, by `time.perf_counter`."""

    path: str
    at: float

    @classmethod
    def of(cls, request: Request) -> "Arrival":
        """That of a request which comes in now."""
        return cls(request.url.path, time.perf_counter())


class Desk:
    """Where texts are asked for.

    Args:
        thread: that computes.
        metrics: what is counted.
        traffic: that is watched; None where nobody watches.
    """

    def __init__(
        self, thread: ModelThread, metrics: Metrics, traffic: Traffic | None = None
    ) -> None:
        self.thread, self.metrics, self.traffic = thread, metrics, traffic

    async def begin(
        self, arrival: Arrival, prompts: list[list[int]], params: list[SamplingParams]
    ) -> "Texts":
        """Begin to continue prompts, each in all ways of `params`, once their steering is ready.

        Raises:
            UserError: they cannot be continued so, or too much is asked for.
        """
        engine = self.thread.engine
        refuse_too_many(len(prompts), len(params))
        refuse_too_long(prompts, params)
        refuse_too_much(engine.model.config, prompts, params)
        if params[0].steering is not None:
            await asyncio.to_thread(engine.steerings.of, params[0].steering)
        return Texts(self, arrival, prompts, params)


class Texts:
    """The texts that one request asked for, in the making: `params` of each of the prompts.

    Tokens come in the order in which they are made; their `row` is the number of their text.
    """

    def __init__(
        self,
        desk: Desk,
        arrival: Arrival,
        prompts: list[list[int]],
        params: list[SamplingParams],
    ) -> None:
        self._thread, self._metrics, self._arrived = desk.thread, desk.metrics, arrival.at
        self._events: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.generated_tokens = 0
        self.count = len(prompts) * len(params)
        self._choices = len(params)
        loop, receive = asyncio.get_running_loop(), self._events.put_nowait
        self._watched = None
        self._texts: list[Sequence] = []
        try:
            for prompt in prompts:
                for how in params:
                    number = len(self._texts)
                    submit = self._thread.submit
                    self._texts.append(submit(prompt, how, receive, number, self, loop))
        except UserError:
            self.end()
            raise
        if desk.traffic is not None:
            self._watched = desk.traffic.begin(arrival.path, prompts, params)

    @property
    def reused_tokens(self) -> int:
        """Tokens of prompts that an earlier text had left in the cache."""
        return sum(text.reused for text in self._texts[:: self._choices])

    @property
    def usage(self) -> dict[str, Any]:
        """How many tokens were read and made."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.reused_tokens},
        }

    async def __aiter__(self) -> AsyncIterator[Token]:
        """Yield tokens until every text has ended; leaving early ends them all."""
        metrics, running = self._metrics, self.count
        last: dict[int, float] = {}
        try:
            while running:
                event = await self._events.get()
                if isinstance(event, Exception):
                    self._watch_end("failed")
                    raise event
                now = time.perf_counter()
                if event.row in last:
                    metrics.each_token.observe(now - last[event.row])
                else:
                    metrics.first_token.observe(now - self._arrived)
                last[event.row] = now
                self.generated_tokens += 1
                running -= event.finish_reason is not None
                if self._watched is not None:
                    self._watched.add(event)
                if not running:
                    self._watch_end("ended")
                yield event
        finally:
            self.end()
            metrics.prompt_tokens.inc(self.prompt_tokens)
            metrics.reused_tokens.inc(self.reused_tokens)
            metrics.generated_tokens.inc(self.generated_tokens)
            metrics.request.observe(time.perf_counter() - self._arrived)

    def end(self) -> None:
        """Make no more tokens."""
        for text in self._texts:
            self._thread.cancel(text)
        self._watch_end("cancelled")

    def _watch_end(self, state: WatchedState) -> None:
        """Tell who watches how it ended, unless it had before."""
        if self._watched is not None:
            self._watched.end(state)


def refuse_too_many(prompts: int, choices: int) -> None:
    """Refuse more texts than one request may ask for.

    Raises:
        UserError: there are more.
    """
    if prompts * choices > MAX_TEXTS:
        raise UserError(
            f"the request asks for {prompts * choices} texts at once; ask for {MAX_TEXTS} at most"
        )


def refuse_too_long(prompts: list[list[int]], params: list[SamplingParams]) -> None:
    """Refuse several texts that would leave no others a place in the queue.

    Raises:
        UserError: there are several, and they have more tokens than one request may have wait.
    """
    answers = sum(min(how.max_tokens, EXPECTED_TOKENS) for how in params)
    tokens = sum(len(prompt) * len(params) + answers for prompt in prompts)
    if len(prompts) * len(params) > 1 and tokens > MAX_QUEUED_TOKENS:
        raise UserError(
            f"the request's texts have {tokens:,} tokens to be read or made; ask for "
            f"{MAX_QUEUED_TOKENS:,} at most at a time"
        )


def refuse_too_much(
    config: ModelConfig, prompts: list[list[int]], params: list[SamplingParams]
) -> None:
    """Refuse to tell more of prompts than a server should hold for one request.

    Raises:
        UserError: more is asked for, or something that the model does not have.
    """
    of_each = 0  # numbers that are told of each token
    for how in params:
        of_each += 0 if how.prompt_logprobs is None else 1 + how.prompt_logprobs
        if how.routed_experts:
            if not config.n_routed_experts:
                raise UserError("the model has no routed experts of which to tell", "no_experts")
            steered = how.steering and how.steering.num_experts_per_tok
            slots = steered or config.num_experts_per_tok or config.n_routed_experts
            of_each += config.num_hidden_layers * slots
    told = of_each * sum(len(prompt) for prompt in prompts)
    if told > MAX_TOLD:
        raise UserError(
            f"the request asks for {told:,} numbers about its prompts; ask for {MAX_TOLD:,} at "
            "most: fewer or shorter prompts, or less of each token"
        )
