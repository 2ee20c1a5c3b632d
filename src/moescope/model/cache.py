"""What attention remembers of earlier tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, cast

import torch
from torch import Tensor

Handle = TypeVar("Handle")
"""What a kernel knows all layers' slots by."""
HandOver = Callable[[list[tuple[Tensor, Tensor]]], Handle]
"""Turns every layer's keys and values, `(blocks, slots, ...)`, into what a kernel knows them by."""

GROWTH = 256
"""Slots are added in steps of this many, so that there is always one for the next token."""


@dataclass(frozen=True)
class SlotForm:
    """What a kernel that stores keys and values itself keeps of a token in each layer.

    Attributes:
        keys: shape of a slot's keys.
        values: of its values.
        dtype: of both.
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]
    dtype: torch.dtype

    def slots(self, *batch_and_slots: int) -> tuple[Tensor, Tensor]:
        """Zeros for keys and for values, `(batch, slots, ...)`."""
        return (
            torch.zeros(*batch_and_slots, *self.keys, dtype=self.dtype),
            torch.zeros(*batch_and_slots, *self.values, dtype=self.dtype),
        )


@dataclass(frozen=True)
class _Further:
    """States `(batch, slots, ...)` of a layer beside its keys and values."""

    states: Tensor
    tokens_per_slot: int

    def slots(self, length: int) -> int:
        """How many slots so many tokens take."""
        return -(-length // self.tokens_per_slot)


class Cache:
    """Keys and values of every layer for a batch of sequences; a token's slot is its position.

    For latent attention these are the latent vectors and the shared rotated keys
    (DeepSeek-V2, section 2.1.2); the cache is told nothing of the difference. Rows may be of
    unequal length: a slot beyond a row's last token holds nothing that a query may see, and is
    overwritten when the row gets there.

    A layer may keep further states under names of its own, one for each token or one for each
    window of several: what an indexer compares, what a compressor joins. Nothing of them depends
    on where a pass began or ended, so that a text can be cut at any token.
    """

    def __init__(self) -> None:
        self.length = 0
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}
        self._further: dict[tuple[int, str], _Further] = {}
        self._handle: object = None  # of the slots as they are now
        self._tables: list[list[int]] = []  # of the same

    def update(
        self, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store `(batch, seq, ...)` at `positions` `(batch, seq)`; return all slots used so far."""
        self.length = max(self.length, int(positions.max()) + 1)
        held = self._slots.get(layer_idx) or (_room(keys, 0), _room(values, 0))
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        grown = tuple(_grow(slots, self.length) for slots in held)
        for slots, new in zip(grown, (keys, values), strict=True):
            slots[rows, positions] = new
        self._slots[layer_idx] = grown[0], grown[1]
        self._handle = None
        return grown[0][:, : self.length], grown[1][:, : self.length]

    def store(
        self, layer_idx: int, name: str, states: Tensor, places: Tensor, tokens_per_slot: int = 1
    ) -> Tensor:
        """Store further states of tokens that `update` has been told of.

        Args:
            layer_idx: whose they are.
            name: of the states, in that layer.
            states: `(batch, count, ...)`.
            places: `(batch, count)`, positions divided by `tokens_per_slot`, rounded down.
            tokens_per_slot: that share one.

        Returns:
            All slots used so far, `(batch, slots, ...)`.
        """
        held = self._further.get((layer_idx, name)) or _Further(_room(states, 0), tokens_per_slot)
        used = held.slots(self.length)
        grown = _grow(held.states, used)
        rows = torch.arange(places.shape[0], device=places.device)[:, None]
        grown[rows, places] = states
        self._further[layer_idx, name] = _Further(grown, tokens_per_slot)
        return grown[:, :used]

    def reserve(
        self,
        layers: int,
        batch: int,
        form: SlotForm,
        length: int,
        hand_over: HandOver[Handle],
    ) -> tuple[Handle, list[list[int]]]:
        """Make room for a kernel that stores keys and values of all layers itself.

        Args:
            layers: of the network.
            batch: rows.
            form: of a slot.
            length: slots that are needed at least.
            hand_over: called again only when the slots have moved.

        Returns:
            What `hand_over` made, and the blocks of each row, as many for one as for another.
        """
        self.length = max(self.length, length)
        if self._handle is None or self._slots[0][0].shape[1] < self.length:
            empty = form.slots(batch, 0)
            for layer_idx in range(layers):
                keys, values = self._slots.get(layer_idx, empty)
                self._slots[layer_idx] = _grow(keys, self.length), _grow(values, self.length)
            self._handle = hand_over([self._slots[layer_idx] for layer_idx in range(layers)])
            self._tables = [[row] for row in range(batch)]
        return cast(Handle, self._handle), self._tables

    @property
    def nbytes(self) -> int:
        """Bytes that the slots in use take."""
        used = [
            slots[:, : self.length] for pair in list(self._slots.values()) for slots in pair
        ] + [held.states[:, : held.slots(self.length)] for held in list(self._further.values())]
        return sum(slots.numel() * slots.element_size() for slots in used)


class BlockPool:
    """Slots of any number of texts in blocks of equally many tokens; block 0 stays empty.

    Args:
        block_tokens: tokens of a block, a multiple of what any further states share a slot of.
        limit: blocks that there may be; None for as many as are asked for.
    """

    def __init__(self, block_tokens: int, limit: int | None = None) -> None:
        self.block_tokens, self.limit = block_tokens, limit
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}  # (blocks, slots, ...)
        self._further: dict[tuple[int, str], _Further] = {}
        self._count = 1
        self._handle: object = None

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers; 0 before anything has been stored."""
        return sum(t[0].numel() * t.element_size() for t in self._tensors() if len(t))

    def grow(self, count: int) -> None:
        """See that there are so many blocks."""
        if count <= self._count:
            return
        self._count = count
        for layer_idx, (keys, values) in self._slots.items():  # one is held twice at a time
            self._slots[layer_idx] = self._sized(keys), self._sized(values)
        for key, held in self._further.items():
            self._further[key] = _Further(self._sized(held.states), held.tokens_per_slot)

    def move(self, block: int, source: int, tokens: int, *, clean: bool = True) -> None:
        """Begin a block with the first tokens of another.

        Args:
            block: that a text is given.
            source: whose first tokens it begins with.
            tokens: how many.
            clean: whether the rest becomes zeros, as whoever reads whole blocks needs it. Else it
                stays what it is, and memory that nobody has touched yet stays so.
        """
        for slots in (slots for pair in self._slots.values() for slots in pair):
            _begin(slots, block, source, tokens, clean)
        for held in self._further.values():
            _begin(held.states, block, source, held.slots(tokens), clean)

    def rows(self, tables: Sequence[Sequence[int]], length: int) -> "BlockRows":
        """Return the cache of a batch of texts in these blocks, the longest of `length` tokens."""
        return BlockRows(self, tables, length)

    def slots(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, `(blocks, slots, ...)`, for such as `(batch, seq, ...)`."""
        if layer_idx not in self._slots:
            self._slots[layer_idx] = self._new(keys, 1), self._new(values, 1)
            self._handle = None
        return self._slots[layer_idx]

    def further(self, layer_idx: int, name: str, states: Tensor, tokens_per_slot: int) -> Tensor:
        """The same of further states."""
        if (layer_idx, name) not in self._further:
            if self.block_tokens % tokens_per_slot:
                raise ValueError(f"blocks of {self.block_tokens} cut slots of {tokens_per_slot}")
            made = _Further(self._new(states, tokens_per_slot), tokens_per_slot)
            self._further[layer_idx, name] = made
        return self._further[layer_idx, name].states

    def handle(self, layers: int, form: SlotForm, hand_over: HandOver[Handle]) -> Handle:
        """What a kernel knows all blocks by, as for `Cache.reserve`."""
        if self._handle is None:
            like = form.slots(1, 1)
            held = [self.slots(layer_idx, *like) for layer_idx in range(layers)]
            self._handle = hand_over(held)
        return cast(Handle, self._handle)

    def _tensors(self) -> list[Tensor]:
        pairs = [slots for pair in list(self._slots.values()) for slots in pair]
        return pairs + [held.states for held in list(self._further.values())]

    def _new(self, like: Tensor, tokens_per_slot: int) -> Tensor:
        shape = (0, self.block_tokens // tokens_per_slot, *like.shape[2:])
        made = self._sized(like.new_empty(shape))
        made[: self._count] = 0  # those that were begun when nothing was there yet
        return made

    def _sized(self, blocks: Tensor) -> Tensor:
        """Blocks with room for all that there are, and for all that may be where that is free."""
        if len(blocks) >= self._count:
            return blocks
        lazy = blocks.device.type == "cpu"  # where pages that nobody touched take no memory
        capacity = max(self._count, 2 * len(blocks))
        if self.limit is not None:
            capacity = self.limit + 1 if lazy else min(capacity, self.limit + 1)
        grown = blocks.new_empty(capacity, *blocks.shape[1:])
        grown[: len(blocks)] = blocks
        self._handle = None
        return grown


class BlockRows:
    """The cache of a batch of texts in the blocks of a pool."""

    def __init__(self, pool: BlockPool, tables: Sequence[Sequence[int]], length: int) -> None:
        self._pool, self._length = pool, length
        width = max(len(table) for table in tables)
        self._tables = [[*table, *[0] * (width - len(table))] for table in tables]
        first = tables[0][0]
        side_by_side = list(tables[0]) == list(range(first, first + width))
        self._run = slice(first, first + width) if len(tables) == 1 and side_by_side else None

    def update(
        self, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store `(batch, seq, ...)` at `positions` `(batch, seq)`; return all slots so far."""
        held_keys, held_values = self._pool.slots(layer_idx, keys, values)
        return (
            self._stored(held_keys, keys, positions, self._length),
            self._stored(held_values, values, positions, self._length),
        )

    def store(
        self, layer_idx: int, name: str, states: Tensor, places: Tensor, tokens_per_slot: int = 1
    ) -> Tensor:
        """Store further states of the same tokens, as `Cache.store` does."""
        held = self._pool.further(layer_idx, name, states, tokens_per_slot)
        used = _Further(held, tokens_per_slot).slots(self._length)
        found = self._stored(held, states, places, used)
        held[0] = 0  # a row may have stored what lies beyond its own blocks
        return found

    def reserve(
        self,
        layers: int,
        batch: int,
        form: SlotForm,
        length: int,
        hand_over: HandOver[Handle],
    ) -> tuple[Handle, list[list[int]]]:
        """Return what a kernel that stores keys and values itself knows these rows by."""
        assert batch == len(self._tables) and length == self._length
        return self._pool.handle(layers, form, hand_over), self._tables

    @cached_property
    def _table(self) -> Tensor:
        return torch.tensor(self._tables)

    def _stored(self, held: Tensor, states: Tensor, places: Tensor, used: int) -> Tensor:
        """Store states `(batch, seq, ...)` in `(blocks, slots, ...)`; return the rows' first slots.

        Returns:
            `(batch, used, ...)`.
        """
        tables, size = self._table.to(held.device), held.shape[1]
        held[tables.gather(1, places // size), places % size] = states
        if self._run is not None:  # the blocks lie side by side
            return held[self._run].flatten(0, 1)[None, :used]
        return held[tables].flatten(1, 2)[:, :used]


def _begin(slots: Tensor, block: int, source: int, count: int, clean: bool) -> None:
    if count:
        slots[block, :count] = slots[source, :count]
    if clean:
        slots[block, count:] = 0


def _room(like: Tensor, slots: int) -> Tensor:
    """Return zeros `(batch, slots, ...)` of the type and trailing shape of `(batch, seq, ...)`."""
    return like.new_zeros(like.shape[0], slots, *like.shape[2:])


def _grow(slots: Tensor, length: int) -> Tensor:
    held = slots.shape[1]
    if held >= length:
        return slots
    return _sized(slots, (max(length, held + held // 4) // GROWTH + 1) * GROWTH)


def _sized(slots: Tensor, capacity: int) -> Tensor:
    """Cut, or fill up with zeros, to so many slots."""
    return torch.cat([slots[:, :capacity], _room(slots, max(0, capacity - slots.shape[1]))], dim=1)
