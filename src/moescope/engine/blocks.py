"""Blocks of the cache: who holds which, and which texts begin alike.

A text's keys and values lie in blocks of equally many tokens, which need not lie side by side
(Kwon et al. 2023, "PagedAttention", section 4). A block that is full of known tokens is known by a
digest of all tokens up to its end, so that any text that begins like an earlier one shares its
blocks; of a block that agrees in part, that part is copied. Blocks that nobody holds any more keep
what is in them until they are needed, those longest unused first. Nothing here is a tensor.

Kernels may sum tokens of a prompt in another order than those that were made one by one. So that a
text is the same whatever others do or left behind, a prompt takes made tokens for its own in two
cases alone: with all that an ended text had made, as a conversation that goes on does, and in whole
blocks.
"""

import hashlib
import sys
from array import array
from collections import OrderedDict
from dataclasses import dataclass

from moescope.engine.sequence import Sequence

NULL = 0
"""A block that nobody is given; it stays empty, and stands where a table has no other."""

KEPT = 32
"""Blocks of ended texts that are kept where there is no limit."""


@dataclass(frozen=True)
class Move:
    """What a block begins with when it is handed out.

    Attributes:
        block: that is handed out.
        source: from which its first tokens are copied.
        tokens: how many.
    """

    block: int
    source: int = NULL
    tokens: int = 0


@dataclass
class _Block:
    holders: int = 0
    parent: bytes | None = None  # digest of all tokens before; None where nothing is known
    ids: tuple[int, ...] = ()
    digest: bytes | None = None  # once it is full
    given: int = sys.maxsize  # how many tokens, from the first, were read as a prompt's
    has_ended: bool = False  # whether no text goes on in it


class Blocks:
    """Hands out blocks, counts who holds them, and finds those that hold a text's beginning.

    Args:
        size: tokens of a block.
        limit: blocks that there may be; None for as many as are asked for.
        least_copied: tokens of a block that are worth a copy.

    Attributes:
        count: blocks that there are by now, `NULL` among them.
        moves: what is to be done, in order, before the next pass; whoever does it empties it.
    """

    def __init__(self, size: int, limit: int | None = None, least_copied: int = 8) -> None:
        self.size, self.limit, self.least_copied = size, limit, least_copied
        self.count = 1
        self.moves: list[Move] = []
        self._blocks = [_Block(holders=1)]
        self._unheld: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._full: dict[bytes, int] = {}
        self._after: dict[bytes, set[int]] = {}  # blocks by the digest of all before them

    @property
    def free(self) -> int | None:
        """Blocks that may still be handed out; None where there is no limit."""
        return None if self.limit is None else self.limit - self.held

    @property
    def held(self) -> int:
        """Blocks that somebody holds."""
        return self.count - 1 - len(self._unheld)

    @property
    def kept(self) -> int:
        """Blocks that nobody holds and that still hold a known text's tokens."""
        return sum(self._blocks[block].parent is not None for block in self._unheld)

    def needed(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.size)

    def begin(self, sequence: Sequence) -> None:
        """Give a text that holds nothing the blocks of its longest known beginning.

        All of its tokens are never taken for known: the last is read for what follows it.
        """
        ids = sequence.ids
        sequence.digests = [sequence.salt]
        while len(sequence.blocks) < (len(ids) - 1) // self.size:
            start = len(sequence.blocks) * self.size
            digest = _digest(sequence.digests[-1], ids[start : start + self.size])
            block = self._full.get(digest)
            if block is None:
                break
            self._hold(block)
            sequence.blocks.append(block)
            sequence.digests.append(digest)
        sequence.read = len(sequence.blocks) * self.size
        rest = ids[sequence.read : min(sequence.read + self.size, len(ids) - 1)]
        given = sequence.unread_prompt
        source, shared = self._most_alike(sequence.digests[-1], rest, given)
        if shared >= self.least_copied and self.can_take(1, holding=source):
            self._hold(source)
            block = self._take()
            self.moves.append(Move(block, source, shared))
            self._blocks[block].given = self._blocks[source].given
            self._release(source)
            sequence.blocks.append(block)
            sequence.read += shared
        if sequence.is_new:
            sequence.reused = sequence.read

    def goes_on(self, sequence: Sequence) -> bool:
        """Whether the last token that a text took for known had been read as a made one."""
        if not sequence.blocks:
            return False
        last = sequence.read - (len(sequence.blocks) - 1) * self.size
        return self._blocks[sequence.blocks[-1]].given < last

    def can_take(self, blocks: int, holding: int | None = None) -> bool:
        """Whether so many can be handed out, while one is held that may be free now."""
        if self.free is None:
            return True
        extra = holding is not None and self._blocks[holding].holders == 0
        return blocks + extra <= self.free

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Hand out what a text needs to hold so many tokens; False, and nothing, if it cannot."""
        missing = self.needed(tokens) - len(sequence.blocks)
        if missing > 0 and not self.can_take(missing):
            return False
        for _ in range(missing):
            block = self._take()
            self.moves.append(Move(block))
            sequence.blocks.append(block)
        return True

    def note(self, sequence: Sequence) -> None:
        """Remember what a text's blocks hold, now that more of it has been read."""
        while len(sequence.digests) <= len(sequence.blocks):
            at = len(sequence.digests) - 1
            start, end = at * self.size, min((at + 1) * self.size, sequence.read)
            if start >= end:
                return
            parent, block = sequence.digests[at], self._blocks[sequence.blocks[at]]
            if block.digest is None:
                block.ids = tuple(sequence.ids[start:end])
                block.given = min(block.given, max(0, sequence.given - start))
                if block.parent is None:
                    block.parent = parent
                    self._after.setdefault(parent, set()).add(sequence.blocks[at])
            if end - start < self.size:
                return
            digest = _digest(parent, sequence.ids[start:end])
            if block.digest is None:
                block.digest = digest
                self._full.setdefault(digest, sequence.blocks[at])
            sequence.digests.append(digest)

    def release(self, sequence: Sequence, *, ended: bool = False) -> None:
        """Take back all that a text holds; a text's end is given up before its beginning.

        Args:
            sequence: the text.
            ended: whether it will not be read again.
        """
        for block in reversed(sequence.blocks):
            self._blocks[block].has_ended |= ended
            self._release(block)
        sequence.blocks, sequence.digests, sequence.read = [], [], 0

    def distrust(self, sequence: Sequence) -> None:
        """Know nothing of what a text's blocks hold."""
        for block in sequence.blocks:
            self._forget(block)

    def forget(self) -> None:
        """Know nothing of what blocks hold that nobody holds."""
        for block in self._unheld:
            self._forget(block)

    def _hold(self, block: int) -> None:
        if self._blocks[block].holders == 0:
            del self._unheld[block]
        self._blocks[block].holders += 1

    def _release(self, block: int) -> None:
        self._blocks[block].holders -= 1
        if self._blocks[block].holders == 0:
            self._unheld[block] = None
            if self._blocks[block].parent is None:  # nothing is lost with it: it goes first
                self._unheld.move_to_end(block, last=False)

    def _take(self) -> int:
        most = self.held + KEPT if self.limit is None else self.limit
        if self._unheld and self.count > most:
            block, _ = self._unheld.popitem(last=False)
            self._forget(block)
        else:
            block = self.count
            self.count += 1
            self._blocks.append(_Block())
        self._blocks[block].holders = 1
        return block

    def _forget(self, block: int) -> None:
        known = self._blocks[block]
        if known.digest is not None and self._full.get(known.digest) == block:
            del self._full[known.digest]
        if known.parent is not None:
            siblings = self._after[known.parent]
            siblings.discard(block)
            if not siblings:
                del self._after[known.parent]
        self._blocks[block] = _Block(holders=known.holders)

    def _most_alike(self, parent: bytes, ids: list[int], given: int) -> tuple[int, int]:
        """Of the blocks that go on from the same tokens the one that shares most of `ids`.

        Args:
            parent: digest of all tokens before.
            ids: of a text.
            given: how many of them, from the first, are its prompt's.
        """
        best, shared = NULL, 0
        for block in self._after.get(parent, ()):
            known = self._blocks[block]
            common = _shared_beginning(known.ids, ids)
            is_all = known.has_ended and common == len(known.ids)
            if not is_all and known.given != given:
                common = min(common, known.given, given)
            if common > shared:
                best, shared = block, common
        return best, shared


def _digest(parent: bytes, ids: list[int]) -> bytes:
    return hashlib.blake2b(array("q", ids).tobytes(), key=parent, digest_size=16).digest()


def _shared_beginning(ids: tuple[int, ...], other: list[int]) -> int:
    """How many ids two texts have in common from the first on."""
    return next(
        (at for at, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b),
        min(len(ids), len(other)),
    )
