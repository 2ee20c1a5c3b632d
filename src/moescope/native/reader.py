"""What a packer reads of a checkpoint: numbers to be rounded, or the file's own blocks."""

import logging
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moescope.formats.source import ReadBlocks, ReadExpert
from moescope.kernels.blocks import Blocks, requantized
from moescope.native.importance import Importance
from moescope.native.weight_format import BLOCK_FORMATS

SUBSTITUTE = "Q8_0"
"""For types that the kernels do not know, all of fewer bits."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weighed:
    """Numbers to be rounded, and how much an error in each of their columns counts.

    Attributes:
        numbers: `(..., outputs, columns)`.
        importance: `(columns,)`.
    """

    numbers: Tensor
    importance: Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the numbers."""
        return self.numbers.shape


Matrices = Tensor | Weighed | Blocks


@dataclass(frozen=True)
class Stack:
    """Matrices that are read one at a time, when they are packed.

    Attributes:
        shape: `(matrices, outputs, columns)`.
        matrix: returns one of them, by its number.
    """

    shape: torch.Size
    matrix: Callable[[int], Matrices]


def no_blocks(name: str, expert: int | None) -> None:
    """Say of every weight that no file holds it in blocks."""


class WeightReader:
    """Reads weights by the network's names.

    Args:
        tensor: returns a weight of the network's state dict in the exact type.
        expert: returns a matrix of one routed expert likewise.
        blocks: returns what the file holds of a weight, None where it holds it otherwise; left
            out where weights are to be rounded anyway.
    """

    def __init__(
        self,
        tensor: Callable[[str], Tensor],
        expert: ReadExpert,
        blocks: ReadBlocks = no_blocks,
    ) -> None:
        self.tensor, self._expert, self._blocks = tensor, expert, blocks
        self._importance: Importance = {}
        self._replaced: set[str] = set()

    def knowing(self, importance: Importance) -> "WeightReader":
        """Return the same reader, which tells how much the columns of some weights count."""
        other = copy(self)
        other._importance = importance
        return other

    def matrix(self, name: str) -> Matrices:
        """Return a weight, `(outputs, columns)`."""
        return self._stored(name) or self._weighed(name, self.tensor(name))

    def experts(self, at: str, gate_up: torch.Size) -> tuple[Stack, Stack, Stack]:
        """Return gate and up `(experts, intermediate, hidden)`, down `(experts, hidden, ...)`.

        Args:
            at: the module that they belong to.
            gate_up: shape of gate and up together.
        """
        experts, both, hidden = gate_up
        inwards = torch.Size((experts, both // 2, hidden))
        outwards = torch.Size((experts, hidden, both // 2))
        shapes = {"gate_proj": inwards, "up_proj": inwards, "down_proj": outwards}
        gate, up, down = (
            Stack(shape, partial(self._one_expert, f"{at}.{name}", shape[1:]))
            for name, shape in shapes.items()
        )
        return gate, up, down

    def _one_expert(self, name: str, shape: torch.Size, expert: int) -> Matrices:
        return self._stored(name, expert) or self._weighed(
            name, self._expert(name, expert, shape), expert
        )

    def _weighed(self, name: str, numbers: Tensor, expert: int | None = None) -> Tensor | Weighed:
        importance = self._importance.get(name)
        if importance is None:
            return numbers
        return Weighed(numbers, importance if expert is None else importance[expert])

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
            whole or self._weighed(name, numbers),
            k_b or numbers[:, :nope].mT.contiguous(),
            v_b or self._weighed(name, numbers[:, nope:].contiguous()),
        )

    def _stored(self, name: str, expert: int | None = None) -> Blocks | None:
        """Return the file's own blocks, in another type where the kernels do not know theirs."""
        blocks = self._blocks(name, expert)
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
