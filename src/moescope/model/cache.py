"""What attention remembers of earlier tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

Handle = TypeVar("Handle")
"""What a kernel knows all layers' slots by."""

GROWTH = 256
"""Slots are added in steps of this many, so that there is always one for the next token."""


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
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        length: int,
        hand_over: Callable[[list[tuple[Tensor, Tensor]]], Handle],
    ) -> Handle:
        """Make room for a kernel that stores float32 keys and values of all layers itself.

        Args:
            layers: of the network.
            batch: rows.
            shapes: of a slot's keys and of its values.
            length: slots that are needed at least.
            hand_over: turns every layer's keys and values, `(batch, slots, ...)`, into what the
                kernel knows them by; called again only when they have moved.
        """
        self.length = max(self.length, length)
        if self._handle is None or self._slots[0][0].shape[1] < self.length:
            empty = torch.zeros(batch, 0, *shapes[0]), torch.zeros(batch, 0, *shapes[1])
            for layer_idx in range(layers):
                keys, values = self._slots.get(layer_idx, empty)
                self._slots[layer_idx] = _grow(keys, self.length), _grow(values, self.length)
            self._handle = hand_over([self._slots[layer_idx] for layer_idx in range(layers)])
        return cast(Handle, self._handle)

    def keep(self, rows: Tensor, length: int) -> None:
        """Forget all sequences but `rows`, `(kept,)` indices, none longer than `length`."""
        slots = (length // GROWTH + 1) * GROWTH  # what a longer one leaves is given back
        for layer_idx, (keys, values) in self._slots.items():  # one layer is held twice at a time
            self._slots[layer_idx] = keys[:, :slots][rows], values[:, :slots][rows]
        for key, held in self._further.items():
            cut = held.states[:, : held.slots(slots)][rows]
            self._further[key] = _Further(cut, held.tokens_per_slot)
        self.length = min(self.length, length)
        self._handle = None

    def join(self, other: "Cache") -> None:
        """Add the sequences of another cache, of the same layers, behind these."""
        self.length = max(self.length, other.length)
        slots = (self.length // GROWTH + 1) * GROWTH
        for layer_idx, added in other._slots.items():
            held = self._slots.get(layer_idx) or (added[0][:0], added[1][:0])
            keys, values = (
                torch.cat([_sized(mine, slots), _sized(its, slots)])
                for mine, its in zip(held, added, strict=True)
            )
            self._slots[layer_idx] = keys, values
        for key, its in other._further.items():
            mine = self._further.get(key) or _Further(its.states[:0], its.tokens_per_slot)
            room = its.slots(slots)
            joined = torch.cat([_sized(mine.states, room), _sized(its.states, room)])
            self._further[key] = _Further(joined, its.tokens_per_slot)
        self._handle = None

    def copy(self, row: int, length: int) -> "Cache":
        """Return the first `length` slots of one sequence as a cache of its own."""
        cache = Cache()
        cache.length = length
        cache._slots = {
            layer_idx: (
                keys[row : row + 1, :length].clone(),
                values[row : row + 1, :length].clone(),
            )
            for layer_idx, (keys, values) in self._slots.items()
        }
        cache._further = {
            key: _Further(
                held.states[row : row + 1, : held.slots(length)].clone(), held.tokens_per_slot
            )
            for key, held in self._further.items()
        }
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes that the slots in use take."""
        used = [
            slots[:, : self.length] for pair in list(self._slots.values()) for slots in pair
        ] + [held.states[:, : held.slots(self.length)] for held in list(self._further.values())]
        return sum(slots.numel() * slots.element_size() for slots in used)


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
