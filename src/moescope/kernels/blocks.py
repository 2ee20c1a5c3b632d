"""A tensor's numbers as a file holds them: quantised blocks, or plain numbers."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Blocks:
    """Matrices whose rows are whole blocks.

    Attributes:
        kind: the type as GGUF names it, such as `Q4_K`; `F8_E4M3` for DeepSeek-V3's FP8.
        shape: `(matrices, outputs, columns)` or `(outputs, columns)`.
        data: `(rows, bytes of a row)`, all matrices' rows one after another.
    """

    kind: str
    shape: torch.Size
    data: NDArray[np.uint8]

    def rows(self, first: int, last: int) -> "Blocks":
        """Return outputs `first` to `last` of every matrix of `(matrices, outputs, columns)`."""
        matrices, outputs, columns = self.shape
        data = self.data.reshape(matrices, outputs, -1)[:, first:last]
        shape = torch.Size((matrices, last - first, columns))
        return Blocks(self.kind, shape, data.reshape(matrices * (last - first), -1))

    def matrix(self, index: int) -> "Blocks":
        """Return one of several matrices."""
        _, outputs, columns = self.shape
        rows = self.data[index * outputs : (index + 1) * outputs]
        return Blocks(self.kind, torch.Size((outputs, columns)), rows)

    def in_matrices(self, count: int) -> "Blocks":
        """Return the rows of one matrix as those of `count`."""
        outputs, columns = self.shape
        return Blocks(self.kind, torch.Size((count, outputs // count, columns)), self.data)


def requantized(blocks: Blocks, kind: str) -> Blocks:
    """Multiply blocks out and round them to another type, some rows at a time."""
    from gguf import GGMLQuantizationType, quants

    def converted(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        numbers = quants.dequantize(rows, GGMLQuantizationType[blocks.kind])
        return quants.quantize(numbers, GGMLQuantizationType[kind])

    starts = range(0, len(blocks.data), ROWS_AT_A_TIME)
    parts = [converted(blocks.data[start : start + ROWS_AT_A_TIME]) for start in starts]
    return replace(blocks, kind=kind, data=np.concatenate(parts))
