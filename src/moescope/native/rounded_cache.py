"""What attention remembers, rounded on its way into the cache."""

import torch
from torch import Tensor

from moescope.model.attention import KVCache


class RoundedCache:
    """A cache that PyTorch's attention fills as the kernels do, where it stands in for them.

    Args:
        cache: that holds all of it.
        dtype: of what is held.
        returned: of the keys and values that are handed back.
    """

    def __init__(self, cache: KVCache, dtype: torch.dtype, returned: torch.dtype) -> None:
        self._cache, self._dtype, self._returned = cache, dtype, returned

    def update(
        self, layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store new slots; return all."""
        rounded = keys.to(self._dtype), values.to(self._dtype)
        held_keys, held_values = self._cache.update(layer_idx, *rounded, positions)
        return held_keys.to(self._returned), held_values.to(self._returned)

    def store(
        self, layer_idx: int, name: str, states: Tensor, places: Tensor, tokens_per_slot: int = 1
    ) -> Tensor:
        """Store further states; return all, in their own type."""
        rounded = states.to(self._dtype)
        held = self._cache.store(layer_idx, name, rounded, places, tokens_per_slot)
        return held.to(states.dtype)
