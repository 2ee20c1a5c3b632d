"""What attention remembers of earlier tokens."""

import torch
from torch import Tensor

GROWTH = 256
"""Slots are added in steps of this many."""


class Cache:
    """Keys and values of every layer for a batch of sequences; a token's slot is its position.

    For latent attention these are the latent vectors and the shared rotated keys
    (DeepSeek-V2, section 2.1.2); the cache is told nothing of the difference. Rows may be of
    unequal length: a slot beyond a row's last token holds nothing that a query may see, and is
    overwritten when the row gets there.
    """

    def __init__(self) -> None:
        self.length = 0
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}

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
        return grown[0][:, : self.length], grown[1][:, : self.length]

    def reserve(
        self, layer_idx: int, batch: int, shapes: tuple[tuple[int, ...], ...], length: int
    ) -> tuple[Tensor, Tensor]:
        """Make room for a kernel that stores float32 keys and values itself.

        Returns all slots of the layer, at least `length`: `(batch, slots, ...)` with what `shapes`
        says of a slot's keys and values.
        """
        self.length = max(self.length, length)
        held = self._slots.get(layer_idx) or tuple(torch.zeros(batch, 0, *s) for s in shapes)
        keys, values = (_grow(slots, self.length) for slots in held)
        self._slots[layer_idx] = keys, values
        return keys, values

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but `rows`, `(kept,)` indices."""
        self._slots = {
            layer_idx: (keys[rows], values[rows])
            for layer_idx, (keys, values) in self._slots.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes that the slots in use take."""
        return sum(
            slots[:, : self.length].numel() * slots.element_size()
            for pair in self._slots.values()
            for slots in pair
        )


def _room(like: Tensor, slots: int) -> Tensor:
    """Return zeros `(batch, slots, ...)` of the type and trailing shape of `(batch, seq, ...)`."""
    return like.new_zeros(like.shape[0], slots, *like.shape[2:])


def _grow(slots: Tensor, length: int) -> Tensor:
    if slots.shape[1] >= length:
        return slots
    capacity = -(-length // GROWTH) * GROWTH
    return torch.cat([slots, _room(slots, capacity - slots.shape[1])], dim=1)
