"""The GGUF container: metadata and tensors of llama.cpp's file format, versions 2 and 3.

Every count, length, type and offset is held against the size of the file before it is used, and
the whole header against fixed limits, so that a damaged or hostile file costs one sentence and no
time. Tensors stay in the file, which is mapped into memory, until one is read; the quantised
blocks are multiplied out by the `gguf` library, some at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.errors import UserError
from moescope.kernels.blocks import Blocks

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Of tensor data, where `general.alignment` does not say otherwise."""

ALIGNMENTS = [1 << power for power in range(3, 21)]

LONGEST_NAME = 1024
MOST_KEYS = 65_536
MOST_TENSORS = 262_144
MOST_ITEMS = 16_777_216
"""Of all arrays together: far above any vocabulary, far below what takes seconds to read."""
MOST_DIMENSIONS = 4
NUMBERS_AT_A_TIME = 32_768
"""That are multiplied out together: what the caches hold, and what one thread does alone."""

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KINDS = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
"""Tensor types by number. `Q4_K_M` and its like are mixtures of them."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor stands.

    Attributes:
        shape: rows before columns, as PyTorch counts (GGUF counts the other way round).
        kind: its type, such as `Q8_0`.
        start: first byte in the file.
        size: bytes.
    """

    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


def damaged(path: Path, why: str) -> UserError:
    """Return the error that says what is wrong with a file."""
    return UserError(f"{path} is no intact GGUF file ({why}); fetch the model again")


class UnfinishedHeader(Exception):
    """The bytes at hand end before the header does."""


class GgufFile:
    """One file, open.

    Attributes:
        path: where it is.
        metadata: values by key; arrays are lists.
        tensors: by name.

    Raises:
        UserError: the file cannot be read, or is no intact GGUF file of a kind that is known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise UserError(f"there is no {path}; check the name") from None
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise UserError(f"{path} cannot be read ({error}); fetch the model again") from error
        header = GgufHeader(path, self._bytes, len(self._bytes))
        self.metadata = header.metadata
        self.tensors = header.tensors

    def exact(self, name: str) -> torch.dtype:
        """Return the narrower of bf16 and float32 that loses nothing of a tensor."""
        return torch.bfloat16 if self.tensors[name].kind == "BF16" else torch.float32

    def blocks(self, name: str) -> Blocks:
        """Return a tensor of two or more dimensions as it stands in the file, uncopied."""
        info = self.tensors[name]
        rows = self.raw(name).reshape(prod(info.shape[:-1]), -1)
        return Blocks(info.kind, torch.Size(info.shape), rows)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Return a tensor's bytes as they stand in the file, uncopied."""
        info = self.tensors[name]
        return np.frombuffer(self._bytes, np.uint8, count=info.size, offset=info.start)

    def read(self, name: str, dtype: torch.dtype | None = None, entry: int | None = None) -> Tensor:
        """Return a tensor, multiplied out.

        Args:
            name: in `tensors`.
            dtype: of the answer; None takes the exact one.
            entry: index into the first dimension, to read nothing else; of two or more dimensions.
        """
        info = self.tensors[name]
        shape, start = info.shape, info.start
        if entry is not None:
            shape, start = shape[1:], start + entry * (info.size // shape[0])
        block, block_bytes = _block_of(info.kind)
        out = torch.empty(prod(shape), dtype=dtype or self.exact(name))
        for part in out.split(NUMBERS_AT_A_TIME // block * block):
            size = len(part) // block * block_bytes
            raw = np.frombuffer(self._bytes, np.uint8, count=size, offset=start)
            part.copy_(_multiplied_out(raw, info.kind))
            start += size
        return out.view(shape)


def _multiplied_out(raw: NDArray[np.uint8], kind: str) -> Tensor:
    """Turn whole blocks into a row of numbers."""
    if kind in _PLAIN:
        return torch.from_numpy(raw.copy()).view(_PLAIN[kind])
    from gguf import quants

    with np.errstate(all="ignore"):  # a scale may be infinite; the product then is, too
        return torch.from_numpy(quants.dequantize(raw[None], _library_type(kind))[0])


def _block_of(kind: str) -> tuple[int, int]:
    """Numbers in a block, and its bytes."""
    if kind in _PLAIN:
        return 1, _PLAIN[kind].itemsize
    from gguf import GGML_QUANT_SIZES

    return GGML_QUANT_SIZES[_library_type(kind)]


def _library_type(kind: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind]


class GgufHeader:
    """What stands in front of the tensors; no step goes beyond the end of the file.

    Attributes:
        metadata: values by key; arrays are lists.
        tensors: by name.

    Raises:
        UserError: the file is no intact GGUF file of a kind that is known.
        UnfinishedHeader: the header is longer than `data`.
    """

    def __init__(self, path: Path, data: bytes | mmap.mmap, size: int) -> None:
        """Read a header.

        Args:
            path: of the file, for messages.
            data: the file's first bytes.
            size: of the whole file.
        """
        self._path, self._data, self._size = path, data, size
        self._at, self._items = 0, 0
        if self._take(4, "the magic number") != MAGIC:
            raise self._refuse("it does not begin with GGUF")
        version = self._number("<I", "the version")
        if version & 0xFFFF == 0:
            raise self._refuse("its byte order is that of big-endian machines")
        if version not in VERSIONS:
            raise self._refuse(f"its version is {version}; versions 2 and 3 are known")
        tensor_count = self._count("tensors", MOST_TENSORS, at_least=24)
        key_count = self._count("keys", MOST_KEYS, at_least=13)
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._name("a key")
            if key in self.metadata:
                raise self._refuse(f"the key {key} stands there twice")
            self.metadata[key] = self._value(self._number("<I", key), key)
        found = [self._tensor() for _ in range(tensor_count)]
        self.tensors = self._placed(found)

    def _refuse(self, why: str) -> UserError:
        return damaged(self._path, why)

    # --- values ---------------------------------------------------------------------------------

    def _take(self, size: int, what: str) -> bytes:
        end = self._at + size
        if end > self._size:
            raise self._refuse(f"it ends within {what}")
        if end > len(self._data):
            raise UnfinishedHeader
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def _number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form), what))[0]

    def _count(self, what: str, most: int, at_least: int) -> int:
        """Read how many follow, each of which takes `at_least` so many bytes."""
        count = self._number("<Q", f"the number of {what}")
        if count > min(most, (self._size - self._at) // at_least):
            raise self._refuse(f"it announces {count} {what}, more than it holds or may hold")
        return count

    def _name(self, what: str) -> str:
        name = self._string(what, LONGEST_NAME)
        if not name.isprintable():
            raise self._refuse(f"{what} holds control characters")
        return name

    def _string(self, what: str, most: int | None = None) -> str:
        length = self._number("<Q", what)
        if most is not None and length > most:
            raise self._refuse(f"{what} is {length} bytes long")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self._refuse(f"{what} is no UTF-8") from None

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self._refuse(f"the value of {key} has the unknown type {kind}")
        return self._number(_SCALARS[kind], key)

    def _array(self, key: str) -> list[Any]:
        kind = self._number("<I", key)
        if kind != _STRING and kind not in _SCALARS:
            raise self._refuse(f"{key} is an array of the unknown type {kind}")
        size = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind])
        count = self._count(f"items of {key}", MOST_ITEMS - self._items, at_least=size)
        self._items += count
        if kind == _STRING:
            return [self._string(key) for _ in range(count)]
        return np.frombuffer(self._take(count * size, key), _SCALARS[kind]).tolist()

    # --- tensors --------------------------------------------------------------------------------

    def _tensor(self) -> tuple[str, tuple[int, ...], str, int]:
        """Read a tensor's name, shape, type and offset behind the header."""
        name = self._name("a tensor's name")
        dimensions = self._number("<I", name)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._refuse(f"{name} has {dimensions} dimensions")
        sizes = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions, name))
        number = self._number("<I", name)
        if number not in _KINDS:
            raise UserError(
                f"{self._path}: the tensor {name} has the type number {number}, which moescope "
                f"does not read; it reads {', '.join(_KINDS.values())}"
            )
        return name, sizes[::-1], _KINDS[number], self._number("<Q", name)

    def _placed(self, found: list[tuple[str, tuple[int, ...], str, int]]) -> dict[str, TensorInfo]:
        """Turn offsets into places in the file, and hold them against its size."""
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment not in ALIGNMENTS:
            raise self._refuse(f"general.alignment is {alignment!r}, no power of two from 8")
        data_start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in found:
            if name in tensors:
                raise self._refuse(f"the tensor {name} stands there twice")
            block, block_bytes = _block_of(kind)
            if min(shape) == 0 or shape[-1] % block:
                raise self._refuse(f"{name} of type {kind} has the shape {shape}")
            start, size = data_start + offset, prod(shape) // block * block_bytes
            if offset % alignment or start + size > self._size:
                raise self._refuse(f"{name} takes {size} bytes from {start}, of {self._size}")
            tensors[name] = TensorInfo(shape, kind, start, size)
        return tensors
