"""Who is read next, who is continued, and who has to wait: no threads, no tensors.

Each step reads a chunk of the prompts that are new beside one token for every text that runs, so
that a long prompt delays the others by one chunk and not by all of it (Agrawal et al. 2023,
"Sarathi", section 4); beside others the chunk is smaller than alone. Places among the texts that
run are shared between *requests*, however many texts each has; of requests with equally many, the
one that has been served least goes first.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from moescope.engine.blocks import Blocks
from moescope.engine.sequence import Sequence
from moescope.errors import UserError

CHUNK = 512
"""Tokens of prompts that are read in one step: enough for experts to get matrices, not vectors."""
CHUNK_OF_MANY = 256
"""The same while a request has several texts: whoever comes in a step waits for its end."""
EXPECTED_TOKENS = 512
"""Tokens of an answer that are counted at most, before it is known how long it becomes."""
TURN = 32
"""Tokens that a request may be served ahead of another that waits for its place."""


class Busy(UserError):
    """More waits than will be answered in any reasonable time."""


@dataclass(frozen=True)
class Chunk:
    """Tokens of one text that are read in the next pass.

    Attributes:
        sequence: the text.
        start: place of the first of them.
        count: how many.
    """

    sequence: Sequence
    start: int
    count: int

    @property
    def is_single(self) -> bool:
        """Whether it is a token that is read by itself, as all are that were made."""
        return self.start >= self.sequence.given

    @property
    def ids(self) -> list[int]:
        """The tokens."""
        return self.sequence.ids[self.start : self.start + self.count]

    @property
    def is_last(self) -> bool:
        """Whether what follows it is wanted."""
        return self.start + self.count == len(self.sequence.ids)

    @property
    def wanted(self) -> int:
        """Of how many tokens, its last ones, more than keys and values is wanted."""
        return self.count if self.sequence.is_read_whole else int(self.is_last)


@dataclass
class _Request:
    """One request's texts that do not run, and how many tokens of it have been computed."""

    waiting: deque[Sequence] = field(default_factory=deque[Sequence])
    running: int = 0
    served: int = 0


class Scheduler:
    """Shares steps between texts.

    Where blocks run out, texts that wait give up theirs first, then the text that joined last; it
    is read again later. So do texts of a request that has more than its share, for one that joins.
    A text that runs alone always finds room: none is longer than all blocks.

    Args:
        blocks: of the cache.
        max_running: texts that run at a time; None for all.
        chunk: tokens of prompts that are read in one step; None for all.
        chunk_beside: the same in a step that continues texts, if it is less; None for as many.
        reuse: whether a text takes what is known of its beginning, unless it is to be read whole.
        short_turn: how many new tokens of a conversation that goes on are read one by one, in one
            step, as those are that were made; 0 for none.

    Attributes:
        chunk: as above; it may change between steps.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        max_running: int | None = None,
        chunk: int | None = CHUNK,
        chunk_beside: int | None = None,
        reuse: bool = True,
        short_turn: int = 0,
    ) -> None:
        self.blocks = blocks
        self.running: list[Sequence] = []  # in the order in which they joined
        self._max_running = max_running
        self.chunk, self._chunk_beside = chunk, chunk_beside
        self._reuse, self._short_turn = reuse, short_turn
        self._requests: dict[Hashable, _Request] = {}
        self._clock = 0  # what the request that has been served least has been served

    def __bool__(self) -> bool:
        return bool(self._requests)

    @property
    def waiting(self) -> list[Sequence]:
        """Texts that do not run."""
        return [one for request in self._requests.values() for one in request.waiting]

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait to be read or made."""
        return sum(work(sequence) for sequence in self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a text behind those of its request."""
        if sequence.request not in self._requests:
            self._requests[sequence.request] = _Request(served=self._clock)
        self._of(sequence).waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """Decide what is read next, single tokens first."""
        self._drop_cancelled()
        self._share_places()
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            if sequence.decodes and self._find_room(sequence):
                chunks.append(Chunk(sequence, sequence.read, 1))
        chunks += self._chunks_of_prompts(beside=bool(chunks))
        chunks = [chunk for chunk in chunks if chunk.sequence.blocks]  # the others were evicted
        if not chunks and self.running:  # prompts stand in each other's way
            if len(self.running) == 1 and not any(other.blocks for other in self.waiting):
                raise Busy("others hold all memory of the cache; try again later")
            self._evict(self.running[-1])
            return self.schedule()
        return sorted(chunks, key=lambda chunk: not chunk.is_single)

    def _chunks_of_prompts(self, *, beside: bool) -> list[Chunk]:
        """Decide what is read of prompts, beside texts that are continued or alone."""
        chunks: list[Chunk] = []
        budget = self.chunk
        if beside and self._chunk_beside is not None:
            budget = self._chunk_beside if budget is None else min(budget, self._chunk_beside)
        prompts = self._prompts()
        if budget is not None and any(self._of(sequence).running > 1 for sequence in prompts):
            budget = min(budget, CHUNK_OF_MANY)
        first = self._of(prompts[0]).running if prompts else 0
        for sequence in prompts:
            if sequence not in self.running:
                continue  # it has made room for another
            if budget is not None and self._of(sequence).running > first + 1:
                break  # who asks for one text does not wait for those of a crowd
            unread = sequence.unread_prompt or sequence.unread
            count = unread if budget is None else min(budget, unread)
            while count and not self.blocks.reserve(sequence, sequence.read + count):
                victim = self._beyond_its_share(self._of(sequence))
                if victim is not None:
                    self._evict(victim)
                else:
                    count = min(count - 1, self._fitting(sequence))
            if count:
                chunks += _chunks(sequence, count)
                budget = None if budget is None else budget - count
            if budget == 0:
                break
        return chunks

    def advance(self, chunk: Chunk) -> None:
        """Note that a chunk has been read."""
        chunk.sequence.read += chunk.count
        self.blocks.note(chunk.sequence)
        self._requests[chunk.sequence.request].served += chunk.count

    def remove(self, sequence: Sequence) -> None:
        """Let a text go that has ended, or that nobody waits for any more."""
        request = self._of(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
            request.running -= 1
        else:
            request.waiting.remove(sequence)
        self.blocks.release(sequence, ended=True)
        if not request.running and not request.waiting:
            del self._requests[sequence.request]

    def clear(self) -> list[Sequence]:
        """Let all texts go; return them."""
        gone = [*self.running, *self.waiting]
        for sequence in gone:
            self.remove(sequence)
        return gone

    def _of(self, sequence: Sequence) -> _Request:
        return self._requests[sequence.request]

    # --- places -----------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        for sequence in [*self.running, *self.waiting]:
            if sequence.cancelled:
                self.remove(sequence)

    def _share_places(self) -> None:
        """Let texts join that wait, and others step back, until all requests have their share."""
        self._clock = max(
            self._clock, min((r.served for r in self._requests.values()), default=self._clock)
        )
        while (nearest := self._next_to_join()) is not None:
            full = self._max_running is not None and len(self.running) >= self._max_running
            back = self._ahead_of(nearest) if full else None
            if full and back is None:
                return
            if not self._has_room(nearest.waiting[0]):
                victim = self._beyond_its_share(nearest)
                if victim is None:
                    return
                self._evict(victim)
                continue
            if back is not None:
                self._step_back(back)
            sequence = nearest.waiting.popleft()
            if not sequence.blocks:
                self._begin(sequence)
            self.running.append(sequence)
            nearest.running += 1

    def _next_to_join(self) -> _Request | None:
        queued = [request for request in self._requests.values() if request.waiting]
        return min(queued, key=lambda request: (request.running, request.served), default=None)

    def _ahead_of(self, request: _Request) -> Sequence | None:
        """The text to step back for a request's next; None where nobody has more than its share."""
        latest = sorted(enumerate(self.running), key=self._share, reverse=True)
        for _, sequence in latest:
            other = self._of(sequence)
            more = other.running - request.running
            if more > 1 or (more == 1 and other.served > request.served + TURN):
                return sequence
        return None

    def _beyond_its_share(self, request: _Request) -> Sequence | None:
        """The text to give up its blocks for a request's next, one that waits if there is such.

        Its request has at least two texts more that run, so that none takes turns in being read.
        """
        latest = sorted(enumerate(self.running), key=self._share, reverse=True)
        holding = [other for other in self.waiting if other.blocks]
        for sequence in [*reversed(holding), *(text for _, text in latest)]:
            if self._of(sequence).running > request.running + 1:
                return sequence
        return None

    def _share(self, place: tuple[int, Sequence]) -> tuple[int, int, int]:
        request = self._of(place[1])
        return request.running, request.served, place[0]

    def _step_back(self, sequence: Sequence) -> None:
        """Have a text wait with what it has read."""
        request = self._of(sequence)
        self.running.remove(sequence)
        request.running -= 1
        request.waiting.appendleft(sequence)

    # --- room -------------------------------------------------------------------------------------

    def _begin(self, sequence: Sequence) -> None:
        if self._reuse and not sequence.is_read_whole:
            self.blocks.begin(sequence)
            is_decided = sequence.given < sequence.prompt_tokens  # when it was begun before
            is_turn = sequence.is_new and not is_decided and self.blocks.goes_on(sequence)
            if is_turn and sequence.unread <= self._short_turn:
                sequence.given = sequence.read
        else:
            sequence.digests = [sequence.salt]

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether a text can join without another's being evicted, if others run."""
        missing = self.blocks.needed(len(sequence.ids) + 1) - len(sequence.blocks)
        return not self.running or self.blocks.can_take(missing)

    def _fitting(self, sequence: Sequence) -> int:
        """Tokens of a prompt for which there are blocks."""
        free = self.blocks.free
        assert free is not None
        return max(0, (len(sequence.blocks) + free) * self.blocks.size - sequence.read)

    def _prompts(self) -> list[Sequence]:
        """Texts of which more than the last made token is unread, the least served first."""
        unread = [sequence for sequence in self.running if not sequence.decodes]
        return sorted(unread, key=lambda sequence: self._of(sequence).served)

    def _find_room(self, sequence: Sequence) -> bool:
        """See that there is a block for a text's next token, by evicting others or itself."""
        while not self.blocks.reserve(sequence, sequence.read + 1):
            holding = [other for other in self.waiting if other.blocks]
            last = self.running[-1]
            beyond = self._beyond_its_share(self._of(last))
            victim = holding[-1] if holding else beyond or last
            self._evict(victim)
            if victim is sequence:
                return False
        return sequence in self.running

    def _evict(self, sequence: Sequence) -> None:
        """Take back a text's blocks; it waits, and is read again."""
        if sequence in self.running:
            self._step_back(sequence)
        self.blocks.release(sequence)


def _chunks(sequence: Sequence, count: int) -> list[Chunk]:
    """The next tokens of a text: those of its prompt together, those that were made one by one."""
    if sequence.unread_prompt:
        return [Chunk(sequence, sequence.read, count)]
    return [Chunk(sequence, sequence.read + at, 1) for at in range(count)]


def work(sequence: Sequence) -> int:
    """Tokens that a text takes to be read and made, as far as one can tell."""
    return sequence.unread + min(sequence.room, EXPECTED_TOKENS)
