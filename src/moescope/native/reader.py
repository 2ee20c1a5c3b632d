"""What a packer reads of a checkpoint: numbers to be rounded, or the file's own blocks."""

import logging
from collections.abc import Callable

from torch import Tensor

from moescope.kernels.blocks import Blocks, requantized
from moescope.native.weight_format import BLOCK_FORMATS

Matrices = Tensor | Blocks
SUBSTITUTE = "Q8_0"
"""For types that the kernels do not know, all of fewer bits."""

log = logging.getLogger(__name__)


def no_blocks(name: str) -> None:
    """Say of every weight that no file holds it in blocks."""


class WeightReader:
    """Reads weights by the network's names.

    Args:
        tensor: returns a weight of the network's state dict in the exact type.
        blocks: returns what the file holds of a weight, None where it holds it otherwise; left
            out where weights are to be rounded anyway.
    """

    def __init__(
        self,
        tensor: Callable[[str], Tensor],
        blocks: Callable[[str], Blocks | None] = no_blocks,
    ) -> None:
        self.tensor, self._blocks = tensor, blocks
        self._replaced: set[str] = set()

    def matrix(self, name: str) -> Matrices:
        """Return a weight, `(outputs, columns)`."""
        return self._stored(name) or self.tensor(name)

    def experts(self, at: str) -> tuple[Matrices, Matrices, Matrices]:
        """Return gate and up `(experts, intermediate, hidden)`, down `(experts, hidden, ...)`."""
        down = self._stored(f"{at}.down_proj") or self.tensor(f"{at}.down_proj")
        gate, up = self._stored(f"{at}.gate_proj"), self._stored(f"{at}.up_proj")
        if gate is not None and up is not None:
            return gate, up, down
        gate_proj, up_proj = self.tensor(f"{at}.gate_up_proj").chunk(2, dim=1)
        return gate_proj, up_proj, down

    def latent(self, at: str, heads: int, nope: int) -> tuple[Matrices, Matrices, Matrices]:
        """Return what expands latents, for all heads and in the two arrangements that are used.

        Args:
            at: the attention that it belongs to.
            heads: of the attention.
            nope: width of a head's unrotated part.

        Returns:
            `kv_b_proj` `(heads, nope + v_head_dim, rank)`, its key half turned round
            `(heads, rank, nope)`, and its value half `(heads, v_head_dim, rank)`.
        """
        name = f"{at}.kv_b_proj.weight"
        whole, k_b, v_b = (self._stored(n) for n in (name, f"{at}.k_b_proj", f"{at}.v_b_proj"))
        numbers = self.tensor(name).unflatten(0, (heads, -1))
        if whole is not None:
            whole = whole.in_matrices(heads)
            v_b = whole.rows(nope, whole.shape[1])
        return (
            whole or numbers,
            k_b or numbers[:, :nope].mT.contiguous(),
            v_b or numbers[:, nope:].contiguous(),
        )

    def _stored(self, name: str) -> Blocks | None:
        """Return the file's own blocks, in another type where the kernels do not know theirs."""
        blocks = self._blocks(name)
        if blocks is None or blocks.kind in BLOCK_FORMATS:
            return blocks
        if blocks.kind not in self._replaced:
            log.warning(
                "the kernels do not know %s: such weights are held as %s, in 8.5 bits instead of "
                "%.1f each",
                blocks.kind,
                SUBSTITUTE,
                8 * blocks.data.size / blocks.shape.numel(),
            )
            self._replaced.add(blocks.kind)
        return requantized(blocks, SUBSTITUTE)
