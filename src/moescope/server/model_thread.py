"""The one thread that has the engine step, for requests that come from any other.

What else is to be computed with the model is computed in the same thread, in parts, in turn with
steps: after each part, texts go on for as long as it took, times the requests that have any. So a
picture gets what one more request would, and keeps nobody waiting for longer than a part.
"""

import logging
import time
from asyncio import AbstractEventLoop
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence as Series
from concurrent.futures import Future
from contextlib import suppress
from threading import Condition, Thread
from typing import Any, TypeVar

from moescope.engine.engine import Engine
from moescope.engine.runner import short_turn, tokens_beside
from moescope.engine.sampling import SamplingParams
from moescope.engine.scheduler import Busy, Scheduler, work
from moescope.engine.sequence import Sequence, Token
from moescope.errors import UserError

Event = Token | Exception
Receive = Callable[[Event], None]
_Receiver = tuple[Receive, AbstractEventLoop | None]
Result = TypeVar("Result")

MAX_WAITING = 262_144
"""Tokens that may wait to be read or made: queues are bounded by work, not by how many wait."""
MAX_ASIDE = 32
"""Questions that may wait to be computed aside."""
_ENDING = "the server is shutting down"

log = logging.getLogger(__name__)


class ModelThread:
    """Continues prompts with one engine until it is closed.

    Args:
        engine: what computes.
        max_running: texts that run at a time.
        cache_bytes: that all texts may take in the cache.
        max_waiting: tokens that may wait to be read or made.

    Attributes:
        running: texts that get tokens now.
        waiting: texts that do not.
        waiting_tokens: that those wait for to be read or made.

    Raises:
        UserError: not even one block fits into the bytes.
    """

    def __init__(
        self,
        engine: Engine,
        max_running: int,
        cache_bytes: int,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self.engine = engine
        engine.limit_cache(cache_bytes)
        self._block_bytes = cache_bytes // (engine.blocks.limit or 1)
        self._scheduler = Scheduler(
            engine.blocks,
            max_running=max_running,
            chunk_beside=tokens_beside(engine.model),
            short_turn=short_turn(engine.model),
        )
        self._max_waiting = max_waiting
        self._arrived: list[tuple[Sequence, _Receiver]] = []
        self._receivers: dict[Sequence, _Receiver] = {}  # the thread's own
        self._aside: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._part_begun = 0.0
        self.running = self.waiting = self.waiting_tokens = 0
        self._news = Condition()
        self._closing = False
        self._thread = Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    # --- for any thread -------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: Series[int],
        params: SamplingParams,
        receive: Receive,
        number: int = 0,
        request: Hashable = None,
        loop: AbstractEventLoop | None = None,
    ) -> Sequence:
        """Queue a prompt; `receive` is called with each token, or with what went wrong.

        It must not block.

        Args:
            prompt_ids: the prompt.
            params: how it is continued.
            receive: told what is made.
            number: the tokens' `row`.
            request: whose it is; requests share the model equally. None for a request of its own.
            loop: in which `receive` is called, once a step for all that it made; None for the
                model's thread.

        Raises:
            UserError: the model cannot read the prompt, there is no memory for it, or no token is
                asked for.
            Busy: too much waits, or the server is about to end.
        """
        sequence = self.engine.sequence(prompt_ids, params, number, request or object())
        if params.max_tokens < 1:
            raise UserError("max_tokens is 0; ask for one token at least")
        with self._news:
            if self._closing:
                raise Busy(_ENDING)
            if self.waiting_tokens and self.waiting_tokens + work(sequence) > self._max_waiting:
                raise Busy(
                    f"{self.waiting_tokens:,} tokens wait to be read or made already; "
                    "try again later"
                )
            self._arrived.append((sequence, (receive, loop)))
            self.waiting += 1
            self.waiting_tokens += work(sequence)
            self._news.notify()
        return sequence

    def aside(self, compute: Callable[[], Result]) -> Future[Result]:
        """Have the thread compute something else with the model, which calls `pause` as it can.

        What is asked for is computed one after the other; who cancels it before it is begun,
        has it left out.

        Raises:
            Busy: too much waits, or the server is about to end.
        """
        future: Future[Result] = Future()
        with self._news:
            if self._closing:
                raise Busy(_ENDING)
            if len(self._aside) >= MAX_ASIDE:
                raise Busy(f"{MAX_ASIDE} questions of the page wait already; try again later")
            self._aside.append((compute, future))
            self._news.notify()
        return future

    def cancel(self, sequence: Sequence) -> None:
        """Have a text end as soon as possible; it may still be given a token."""
        sequence.cancelled = True

    def close(self) -> None:
        """End the thread; what still runs is told so."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join()

    @property
    def held_bytes(self) -> int:
        """Bytes of the cache that texts take which run or wait."""
        return self.engine.blocks.held * self._block_bytes

    # --- the thread -----------------------------------------------------------------------------

    def pause(self) -> None:
        """Let texts go on, in what is computed aside, for their share of the time.

        Raises:
            Busy: the server is about to end.
        """
        took = time.perf_counter() - self._part_begun
        until = 0.0
        while self._take_in():
            now = time.perf_counter()
            until = until or now + took * len({text.request for text in self._receivers})
            if now >= until or not self._step(beside=True):
                break
        if self._closing:
            raise Busy(_ENDING)
        self._part_begun = time.perf_counter()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(
                    lambda: self._closing or self._arrived or self._scheduler or self._aside
                )
                if self._closing:
                    self._end_all(Busy(_ENDING))
                    return
            if self._take_in():
                self._step()
            if self._aside:
                self._compute_aside(*self._aside.popleft())

    def _compute_aside(self, compute: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        self._part_begun = time.perf_counter()
        try:
            result = compute()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _take_in(self) -> bool:
        """Queue the texts that have arrived; tell whether there are any, and the server goes on."""
        with self._news:
            for sequence, receiver in self._arrived:
                self._scheduler.add(sequence)
                self._receivers[sequence] = receiver
            self._arrived.clear()
            return bool(self._scheduler) and not self._closing

    def _step(self, *, beside: bool = False) -> bool:
        """Have the engine step; tell whether texts got on.

        Beside what is computed aside they wait where that holds all memory, until it is done.
        """
        try:
            made = self.engine.step(self._scheduler)
        except Exception as error:
            if beside and isinstance(error, Busy):
                return False
            log.exception("the model failed; all requests end")
            with self._news:
                self._end_all(error)
            return False
        _tell((self._receivers[sequence], event) for sequence, event in made)
        for sequence in [s for s in self._receivers if s.cancelled or s.ended]:
            del self._receivers[sequence]
        with self._news:
            self._count()
        return True

    def _count(self) -> None:
        """See what runs and waits; in the thread, under the lock."""
        arrived = [sequence for sequence, _ in self._arrived]
        self.running = len(self._scheduler.running)
        self.waiting = len(self._scheduler.waiting) + len(arrived)
        self.waiting_tokens = self._scheduler.waiting_tokens + sum(map(work, arrived))

    def _end_all(self, why: Exception) -> None:
        self._scheduler.clear()
        self.engine.blocks.forget()
        ended = [*self._receivers.values(), *(receiver for _, receiver in self._arrived)]
        self._receivers.clear()
        self._arrived.clear()
        self._count()
        _tell((receiver, why) for receiver in ended)
        if self._closing:
            for _, future in self._aside:
                if future.set_running_or_notify_cancel():
                    future.set_exception(why)
            self._aside.clear()


def _tell(events: Iterable[tuple[_Receiver, Event]]) -> None:
    """Tell what was made; each loop is woken once, since waking it costs as much as a token."""
    of_loops = defaultdict[AbstractEventLoop, list[tuple[Receive, Event]]](list)
    for (receive, loop), event in events:
        if loop is None:
            receive(event)
        else:
            of_loops[loop].append((receive, event))
    for loop, told in of_loops.items():
        with suppress(RuntimeError):  # the server has ended meanwhile
            loop.call_soon_threadsafe(_hand_out, told)


def _hand_out(told: list[tuple[Receive, Event]]) -> None:
    for receive, event in told:
        receive(event)
