"""Packed weights: laid out, and taken from files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from moescope.kernels.cpu import extension
from moescope.kernels.cpu.tensors import memory_of, memory_or_none

if TYPE_CHECKING:
    from moescope.kernels._native import Weights


def pack(matrices: Tensor, weight_format: str, importance: Tensor | None = None) -> Weights:
    """Round and lay out `(matrices, outputs, columns)` or `(outputs, columns)`.

    Args:
        matrices: float32 or bfloat16.
        weight_format: `int8`, `int4`, `bf16`, `f16` or `f32`.
        importance: how much an error in each column counts in int4's search, `(columns,)`.
    """
    if matrices.ndim == 2:
        matrices = matrices[None]
    if matrices.dtype not in (torch.float32, torch.bfloat16):
        matrices = matrices.float()
    counts = memory_or_none(None if importance is None else importance.float())
    return extension.native.pack(memory_of(matrices.detach()), weight_format, counts)


def quantize_blocks(rows: Tensor, block_type: str) -> NDArray[np.uint8]:
    """Round `(rows, columns)` to the blocks that GGUF files store, `(rows, bytes)`.

    Scales and minima are searched for: the weighted squared error is least, a number's weight being
    its magnitude plus the root mean square of its row.

    Args:
        rows: float32; columns make whole blocks.
        block_type: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4, Q4_K, Q5_K or Q6_K.
    """
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[block_type]]
    out = np.empty((len(rows), rows.shape[1] // numbers * size), np.uint8)
    extension.native.quantize_blocks(memory_of(rows.detach().contiguous()), block_type, out)
    return out


def pack_blocks(data: NDArray[np.uint8], kind: str, shape: tuple[int, int, int]) -> Weights:
    """Lay out a GGUF tensor's blocks, whose numbers stay what they are.

    Args:
        data: whole blocks, rows after rows, matrices after matrices; of numbers, their bytes.
        kind: the tensor's type as GGUF names it (`Q4_K`, `MXFP4`, `F16` ...); for `F8_E4M3`, 128
            columns and, in front of them, their float32 scale make a block, the last one padded.
        shape: `(matrices, outputs, columns)`.

    Raises:
        ValueError: the type is none of `BLOCK_FORMATS`, or such a shape takes another size.
    """
    return extension.native.pack_blocks(data.reshape(-1), kind, *shape)


def empty_weights(weight_format: str, shape: tuple[int, int, int]) -> Weights:
    """Return zeros, whose matrices `put` replaces: `put(index, packed)`, of one matrix.

    Args:
        weight_format: any of `WEIGHT_FORMATS`.
        shape: `(matrices, outputs, columns)`.
    """
    return extension.native.empty_weights(weight_format, *shape)


def unpacked(weights: Weights, shape: tuple[int, int, int]) -> Tensor:
    """The weights as the kernels see them: `shape` is `(matrices, outputs, columns)`."""
    out = torch.empty(shape)
    weights.unpack(memory_of(out))
    return out


def layout() -> str:
    """Name the way in which packed weights lie in memory; what it changes for cannot be read."""
    return extension.native.layout()


def stored_bytes(packed: Weights) -> NDArray[np.uint8]:
    """View all bytes of packed weights."""
    return packed.stored


def checksum(data: NDArray[np.uint8]) -> int:
    """Sum bytes so that damage shows, at the speed of memory."""
    return extension.native.checksum(data)


def read_weights(
    descriptor: int, offset: int, size: int, weight_format: str, shape: tuple[int, int, int]
) -> tuple[Weights, int]:
    """Take packed weights from an open file; return them and their checksum.

    Large ones are mapped where the system can, so that they are there at once; `settle` moves them.

    Args:
        descriptor: of the file.
        offset: where they begin.
        size: bytes.
        weight_format: any of `WEIGHT_FORMATS`.
        shape: `(matrices, outputs, columns)`.

    Raises:
        ValueError: weights of this shape and format have another size.
        RuntimeError: the file cannot be read or ends too early.
    """
    return extension.native.read_weights(descriptor, offset, size, weight_format, *shape)


def settle() -> None:
    """Begin to move mapped weights into 2 MiB pages, in a thread of its own, while they are used.

    They are read faster there. A file that is cut before that is done ends the process.
    """
    extension.native.settle()


def unsettled() -> int:
    """Bytes of weights taken from files that `settle` has still to move."""
    return extension.native.unsettled()
