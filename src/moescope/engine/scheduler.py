"""Many requests, one model: they join the batch and leave it between two tokens.

Each turn reads a piece of the prompts that wait, then makes one token for every text that runs, so
that a long prompt delays the others by one piece and not by all of it (Agrawal et al. 2023,
"Sarathi", section 4). A prompt that begins as an earlier text did, as each turn of a conversation
does, is read from where they part.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition, Thread

import torch

from moescope.engine.batch import Batch, Row, Token
from moescope.engine.engine import Engine
from moescope.engine.sampling import SamplingParams
from moescope.errors import UserError
from moescope.model.cache import Cache

PIECE = 512
"""Tokens of prompts that are read in one turn: enough for experts to get matrices, not vectors."""
MOST_WAITING = 256
KEPT = 8
"""Ended texts whose cache is kept for a prompt that begins like them."""
SHORTEST_REUSE = 16
"""Tokens below which copying a cache is not worth it."""

Receive = Callable[[Token | Exception], None]

log = logging.getLogger(__name__)


class Busy(UserError):
    """More requests wait than will be answered in any reasonable time."""


class Request:
    """One text on its way; `reused` counts the tokens of its prompt that had been read before."""

    def __init__(self, row: Row, receive: Receive) -> None:
        self.row, self.receive = row, receive
        self.reused = 0
        self.cancelled = False
        self.cache: Cache | None = None  # while its prompt is read

    @property
    def unread(self) -> int:
        """Tokens that must be read before it can join: all but the last, at least one."""
        return max(1, len(self.row.ids) - 1) - (self.cache.length if self.cache else 0)

    @property
    def is_new(self) -> bool:
        """Whether it has been given no token yet."""
        return len(self.row.ids) == self.row.prompt_tokens


class Scheduler:
    """Continues prompts with one engine, in a thread of its own, until it is closed.

    Memory is counted in slots, what one token takes in the cache. Running texts take a rectangle of
    them, each as many as the longest. Where they need more, what is kept of ended texts goes first,
    then what has been read of a prompt that waits, then the text that joined last, which waits and
    is read again; a text that runs alone ends with `length` when it has filled all slots.

    Args:
        engine: what computes; nobody else may use it meanwhile.
        max_batch: texts that run at a time.
        cache_bytes: that all caches may take together.

    Raises:
        UserError: not even one token fits into the bytes.
    """

    def __init__(self, engine: Engine, max_batch: int, cache_bytes: int) -> None:
        self.engine = engine
        self._max_batch = max_batch
        self._slots = cache_bytes // _bytes_per_slot(engine)
        if self._slots < 1:
            raise UserError(
                f"{cache_bytes:,} bytes of memory are too few for the cache of one token; "
                "close other programs or take a smaller model"
            )
        self._batch = Batch(engine)
        self._waiting: deque[Request] = deque()  # only the first may have a cache
        self._running: list[Request] = []  # in the order of the batch's rows
        self._kept: deque[tuple[list[int], Cache]] = deque(maxlen=KEPT)
        self._news = Condition()
        self._closing = False
        self._thread = Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    # --- for any thread -------------------------------------------------------------------------

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, receive: Receive, number: int = 0
    ) -> Request:
        """Queue a prompt; `receive` is called with each token, or with what went wrong.

        It is called in the scheduler's thread and must not block. `number` is the tokens' `row`.

        Raises:
            UserError: the model cannot read the prompt, there is no memory for it, or no token is
                asked for.
            Busy: too many wait.
        """
        self.engine.check(prompt_ids)
        if params.max_tokens < 1:
            raise UserError("max_tokens is 0; ask for one token at least")
        if len(prompt_ids) > self._slots:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens but there is memory for {self._slots}; "
                "shorten it"
            )
        request = Request(Row(self.engine, number, prompt_ids, params, self._slots), receive)
        with self._news:
            if self._closing:
                raise Busy("the server is shutting down")
            if len(self._waiting) >= MOST_WAITING:
                raise Busy(f"{MOST_WAITING} requests are waiting already; try again later")
            self._waiting.append(request)
            self._news.notify()
        return request

    def cancel(self, request: Request) -> None:
        """Have a request end as soon as possible; it may still be given a token."""
        request.cancelled = True

    def close(self) -> None:
        """End the thread; what still runs is told so."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join()

    @property
    def running(self) -> int:
        """Texts that get tokens now."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests whose prompts have not been read to their ends."""
        return len(self._waiting)

    @property
    def held_bytes(self) -> int:
        """Bytes of all caches: of running texts, of a prompt that is read, and of texts kept."""
        caches = [self._batch.cache, *(request.cache for request in list(self._waiting))]
        caches += [cache for _, cache in list(self._kept)]
        return sum(cache.nbytes for cache in caches if cache)

    # --- the thread -----------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closing or self._waiting or self._running)
                if self._closing:
                    self._end_all(Busy("the server is shutting down"))
                    return
            try:
                self._turn()
            except Exception as error:
                log.exception("the model failed; all requests end")
                self._batch = Batch(self.engine)
                self._kept.clear()
                with self._news:
                    self._end_all(error)

    def _turn(self) -> None:
        self._drop_cancelled()
        self._read_prompts()
        self._make_room()
        if not self._running:
            return
        running = dict(zip(self._batch.rows, self._running, strict=True))
        for event, (row, request) in zip(self._batch.step(), running.items(), strict=True):
            if isinstance(event, Token) and event.finish_reason is not None:
                self._keep(row)
            request.receive(event)
        self._running = [running[row] for row in self._batch.rows]

    def _read_prompts(self) -> None:
        """Read up to a piece of the prompts that wait, and let those join that are read."""
        budget = PIECE
        while budget and self._waiting and len(self._running) < self._max_batch:
            request = self._waiting[0]
            room = self._slots - self._rectangle(request)
            if room < 0:
                return
            if request.cache is None:
                request.cache = self._known_beginning(request)
            self._let_go(room)
            count = min(budget, request.unread)
            if count:
                start = request.cache.length
                input_ids = self.engine.tensor([request.row.ids[start : start + count]])
                positions = self.engine.tensor([list(range(start, start + count))])
                self.engine.transform(input_ids, positions, request.cache)
                budget -= count
            if request.unread:
                return
            self._batch.join(request.row, request.cache)
            self._running.append(request)
            self._waiting.popleft()  # last: whatever fails before, the request is told
            request.cache = None

    def _known_beginning(self, request: Request) -> Cache:
        """What is known of a prompt's beginning, from the text that shares most of it."""
        ids = request.row.ids[: request.unread]
        known = [(kept_ids, cache, 0) for kept_ids, cache in self._kept]
        known += [(row.ids[:-1], self._batch.cache, at) for at, row in enumerate(self._batch.rows)]
        shared = [_shared_beginning(ids, other) for other, _, _ in known]
        most = max(shared, default=0)
        if most < SHORTEST_REUSE:
            return Cache()
        if request.is_new:
            request.reused = most
        at = shared.index(most)
        ids, cache, row = known[at]
        if at < len(self._kept) and most == len(ids):  # all of it: then none need be copied
            del self._kept[at]
            return cache
        return cache.copy(row, most)

    def _rectangle(self, *joining: Request) -> int:
        """Slots that running texts and those that join them take with their next token."""
        rows = [request.row for request in (*self._running, *joining)]
        lengths = [len(row.ids) for row in rows if not row.ended]
        return len(lengths) * max(lengths, default=0)

    def _let_go(self, slots: int) -> None:
        """Let kept texts go, oldest first, until they take so many slots at most."""
        while sum(cache.length for _, cache in self._kept) > slots:
            self._kept.popleft()

    def _make_room(self) -> None:
        """See that the next token's slots are there."""
        if self._waiting and self._read_ahead > self._slots - self._rectangle():
            self._waiting[0].cache = None
        while (room := self._slots - self._rectangle()) < 0:
            last = self._running[-1]
            self._batch.remove([last.row])
            self._waiting.appendleft(last)
            self._running.pop()  # last: whatever fails before, the request is told
        self._let_go(room - self._read_ahead)

    @property
    def _read_ahead(self) -> int:
        """Slots of the prompt that is being read."""
        read = self._waiting[0].cache if self._waiting else None
        return read.length if read else 0

    def _keep(self, row: Row) -> None:
        """Keep what was read of a text that has ended."""
        ids, at = row.ids[:-1], self._batch.rows.index(row)
        self._keep_cache(ids, lambda: self._batch.cache.copy(at, len(ids)))

    def _keep_cache(self, ids: list[int], take: Callable[[], Cache]) -> None:
        """Keep the cache of some ids, if there is room, in place of what they go on from."""
        room = self._slots - self._rectangle() - self._read_ahead - len(ids)
        if not ids or room < 0:
            return
        kept = (one for one in self._kept if _shared_beginning(one[0], ids) < len(one[0]))
        self._kept = deque(kept, maxlen=KEPT)
        self._let_go(room)
        self._kept.append((ids, take()))

    def _drop_cancelled(self) -> None:
        gone = [r for r in self._running if r.cancelled]  # read once: others set it meanwhile
        for request in gone:
            request.row.ended = True
            self._keep(request.row)
        if gone:
            self._batch.remove([request.row for request in gone])
        self._running = [r for r in self._running if r not in gone]
        with self._news:
            unread = [r for r in self._waiting if r.cancelled]
            self._waiting = deque(r for r in self._waiting if r not in unread)
        for cache, ids in [(r.cache, r.row.ids) for r in unread if r.cache]:
            self._keep_cache(ids[: cache.length], lambda cache=cache: cache)

    def _end_all(self, why: Exception) -> None:
        ended = [*self._running, *self._waiting]
        self._running.clear()
        self._waiting.clear()
        for request in ended:
            request.receive(why)


def _shared_beginning(ids: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two texts have in common from the first on."""
    return next(
        (at for at, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b),
        min(len(ids), len(other)),
    )


def _bytes_per_slot(engine: Engine) -> int:
    """Have one token read, and see what it takes in the cache."""
    cache = Cache()
    with torch.inference_mode():
        engine.transform(engine.tensor([[0]]), engine.tensor([[0]]), cache)
    return cache.nbytes
