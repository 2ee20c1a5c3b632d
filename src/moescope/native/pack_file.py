"""A network's packed weights in a file: what rounding and laying out its matrices made, kept.

Layout: a magic number, the header's length and SHA-256, the header (JSON), then, from the next
multiple of 4 KiB on, what the header lists, in the order in which packing made it. Nothing of a
file is believed before it is checked: the header's sum, every size and offset against the length
of the file, every entry against what the network asks for, and the bytes against their sum while
they are read. What fails is a `StalePack`, and the weights are packed anew.

Weights are mapped, summed and used at once, and moved into memory while they are in use: in 2 MiB
pages they are read faster for as long as the model runs (docs/decisions).
"""

import hashlib
import os
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from moescope.errors import UserError
from moescope.files import atomic_path
from moescope.kernels import cpu
from moescope.kernels.blocks import Blocks
from moescope.native.reader import Matrices, Stack, Weighed
from moescope.native.weight_format import BLOCK_FORMATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moescope.kernels.cpu import Weights

MAGIC = b"MOESPACK"
LONGEST_HEADER = 2**24
RESERVED_HEADER = 2**22
"""Where entries are written before all are known: two thousand layers' worth."""
ALIGNMENT = 4096
_PREFIX = len(MAGIC) + 8 + hashlib.sha256().digest_size

T = TypeVar("T")


class StalePack(Exception):
    """A pack is damaged, or another than the one asked for; the message says why."""


class PackSource(Protocol):
    """Where a network takes its packed weights from.

    Attributes:
        from_file: whether values are ready; what is handed in then needs a shape and a type only.
    """

    from_file: bool

    def weights(
        self,
        matrices: Matrices | Stack,
        weight_format: str | None,
        *,
        of_experts: bool = False,
    ) -> "Weights":
        """Return `(matrices, outputs, columns)` or `(outputs, columns)` packed.

        Args:
            matrices: numbers, or a file's own blocks; of experts, one at a time.
            weight_format: to round numbers to; None rounds nothing.
            of_experts: whether they may stay in a file, from which they are streamed.
        """
        ...


class Entry(BaseModel):
    """One matrix or tensor of a file; `offset` counts from where the header's page ends."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    kind: str
    shape: tuple[int, ...]
    offset: NonNegativeInt
    size: NonNegativeInt
    checksum: NonNegativeInt


class Header(BaseModel):
    """What a file holds; `key` says of what and by which code it was made."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    key: str
    entries: tuple[Entry, ...]


class NewPack:
    """Packs, and remembers what it made, so that it can be written."""

    from_file = False

    def __init__(self) -> None:
        self._made: list[tuple[str, tuple[int, ...], Weights]] = []

    def weights(
        self,
        matrices: Matrices | Stack,
        weight_format: str | None,
        *,
        of_experts: bool = False,
    ) -> "Weights":
        """Round and lay out."""
        kind, packed = _packed(matrices, weight_format)
        self._made.append((kind, _shape(matrices), packed))
        return packed

    @property
    def size(self) -> int:
        """Bytes that a file takes, but for its header."""
        return sum(_aligned(len(cpu.stored_bytes(made))) for _, _, made in self._made)

    def write(self, path: Path, key: str) -> None:
        """Write `path`, atomically.

        Raises:
            UserError: the folder cannot be written or the disk is full.
        """
        entries: list[Entry] = []
        offset = 0
        for kind, shape, made in self._made:
            data = cpu.stored_bytes(made)
            entries.append(
                Entry(
                    kind=kind,
                    shape=shape,
                    offset=offset,
                    size=len(data),
                    checksum=cpu.checksum(data),
                )
            )
            offset += _aligned(len(data))
        header = Header(key=key, entries=tuple(entries)).model_dump_json().encode()
        start = _aligned(_PREFIX + len(header))
        with atomic_path(path) as partial, partial.open("wb") as file:
            file.write(MAGIC + len(header).to_bytes(8, "little"))
            file.write(hashlib.sha256(header).digest() + header)
            for entry, (_, _, made) in zip(entries, self._made, strict=True):
                file.seek(start + entry.offset)
                file.write(cpu.stored_bytes(made).data)
            file.truncate(start + offset)


class StoredPack:
    """Hands out what a file holds, entry by entry.

    Attributes:
        path: the file.

    Raises:
        StalePack: it is damaged, or was made of another source or by other code than `key` says.
    """

    from_file = True

    def __init__(self, path: Path, key: str, *, streams_experts: bool = False) -> None:
        """Open a file.

        Args:
            path: of the file.
            key: that it must have.
            streams_experts: whether experts stay in it until a token visits them.
        """
        self.path = path
        self._streams_experts = streams_experts
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise StalePack(str(error)) from error
        header, self._start = _read_header(self._file)
        if header.key != key:
            raise StalePack("it was made of other files, or by another version of moescope")
        self._fd = self._file.fileno()
        ends = [_aligned(entry.offset + entry.size) for entry in header.entries]
        if os.fstat(self._fd).st_size != self._start + max(ends, default=0):
            raise StalePack("its length is not what its header says")
        self._entries = iter(header.entries)

    def weights(
        self,
        matrices: Matrices | Stack,
        weight_format: str | None,
        *,
        of_experts: bool = False,
    ) -> "Weights":
        """Read the next entry, which must be of this shape and, if it is given, this format.

        Raises:
            StalePack: it is another, or damaged; streamed experts are not summed for that.
        """
        shape = _shape(matrices)
        entry = self._next(None if weight_format is None else (weight_format,), shape)
        if of_experts and self._streams_experts:
            return _streamed(self._fd, self._start + entry.offset, entry.size, entry.kind, shape)
        return self._checked(
            entry, lambda at: cpu.read_weights(self._fd, at, entry.size, entry.kind, shape)
        )

    def close(self) -> None:
        """Close the file and have its weights moved into memory.

        Raises:
            StalePack: it holds more than was asked for.
        """
        self._file.close()
        if next(self._entries, None) is not None:
            raise StalePack("it holds more than the network")
        cpu.settle()

    def _next(self, kinds: Collection[str] | None, shape: tuple[int, ...]) -> Entry:
        """Return the next entry, if it is of this shape and one of these kinds (None: of any)."""
        entry = next(self._entries, None)
        fits = entry is not None and (kinds is None or entry.kind in kinds)
        if entry is None or not fits or entry.shape != shape:
            what = " or ".join(kinds or ["weights"])
            raise StalePack(f"{what} of the shape {shape} does not come next")
        return entry

    def _checked(self, entry: Entry, read: Callable[[int], tuple[T, int]]) -> T:
        try:
            value, checksum = read(self._start + entry.offset)
        except (ValueError, RuntimeError) as error:
            raise StalePack(str(error)) from error
        if checksum != entry.checksum:
            raise StalePack("its bytes are not those that were written")
        return value


class WrittenPack:
    """Packs into a file, entry by entry; of the experts nothing stays in memory.

    The header's place is reserved, since what it lists is known at the end.
    """

    from_file = False

    def __init__(self, file: BinaryIO, key: str) -> None:
        self._file, self._key = file, key
        self._start = _aligned(_PREFIX + RESERVED_HEADER)
        self._offset = 0
        self._entries: list[Entry] = []

    def weights(
        self,
        matrices: Matrices | Stack,
        weight_format: str | None,
        *,
        of_experts: bool = False,
    ) -> "Weights":
        """Round, lay out and write; return experts as `stream_weights` does."""
        shape = _shape(matrices)
        if of_experts and isinstance(matrices, Stack):
            entry = self._write_one_by_one(matrices, weight_format)
            at = self._start + entry.offset
            return _streamed(self._file.fileno(), at, entry.size, entry.kind, shape)
        kind, packed = _packed(matrices, weight_format)
        self._write(kind, shape, cpu.stored_bytes(packed))
        return packed

    def finish(self) -> None:
        """Write the header."""
        header = Header(key=self._key, entries=tuple(self._entries)).model_dump_json().encode()
        header = header.ljust(RESERVED_HEADER)
        self._file.truncate(self._start + self._offset)
        self._file.seek(0)
        self._file.write(MAGIC + len(header).to_bytes(8, "little"))
        self._file.write(hashlib.sha256(header).digest() + header)

    def _write(self, kind: str, shape: tuple[int, ...], data: "NDArray[np.uint8]") -> Entry:
        entry = Entry(
            kind=kind,
            shape=shape,
            offset=self._offset,
            size=len(data),
            checksum=cpu.checksum(data),
        )
        self._file.seek(self._start + self._offset)
        self._file.write(data.data)
        self._append(entry)
        return entry

    def _write_one_by_one(self, stack: Stack, weight_format: str | None) -> Entry:
        """Write matrices as they would lie together: their rows' scales, if any, behind all."""
        start, size, kinds = self._start + self._offset, 0, set[str]()
        for index, (kind, one) in enumerate(_one_by_one(stack, weight_format)):
            kinds.add(kind)
            data, held = cpu.stored_bytes(one), one.matrix_bytes
            scales = len(data) - held
            size = stack.shape[0] * len(data)
            self._file.seek(start + index * held)
            self._file.write(data[:held].data)
            self._file.seek(start + stack.shape[0] * held + index * scales)
            self._file.write(data[held:].data)
        self._file.flush()
        written = np.memmap(self._file, np.uint8, "r", start, size)
        shape, checksum = _shape(stack), cpu.checksum(written)
        (kind,) = kinds
        entry = Entry(kind=kind, shape=shape, offset=self._offset, size=size, checksum=checksum)
        self._append(entry)
        return entry

    def _append(self, entry: Entry) -> None:
        self._file.flush()
        self._entries.append(entry)
        self._offset += _aligned(entry.size)
        self._file.truncate(self._start + self._offset)


@contextmanager
def written_pack(path: Path, key: str) -> Generator[WrittenPack]:
    """Yield a pack that is in `path` once it is whole.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    with atomic_path(path) as partial, partial.open("w+b") as file:
        pack = WrittenPack(file, key)
        yield pack
        pack.finish()


def _streamed(
    descriptor: int, offset: int, size: int, weight_format: str, shape: tuple[int, int, int]
) -> "Weights":
    try:
        return cpu.stream_weights(descriptor, offset, size, weight_format, shape)
    except (ValueError, RuntimeError) as error:
        raise StalePack(str(error)) from error


def _read_header(file: BinaryIO) -> tuple[Header, int]:
    """Return the header and where the entries begin."""
    prefix = file.read(_PREFIX)
    length = int.from_bytes(prefix[len(MAGIC) : len(MAGIC) + 8], "little")
    if prefix[: len(MAGIC)] != MAGIC or length > LONGEST_HEADER:
        raise StalePack("it does not begin as a pack does")
    text = file.read(length)
    if len(text) < length or hashlib.sha256(text).digest() != prefix[len(MAGIC) + 8 :]:
        raise StalePack("its header is damaged")
    try:
        return Header.model_validate_json(text), _aligned(_PREFIX + length)
    except ValidationError as error:
        raise StalePack("its header has another form") from error


def _packed(matrices: Matrices | Stack, weight_format: str | None) -> "tuple[str, Weights]":
    """Round and lay out; return the format, too."""
    if isinstance(matrices, Stack):
        whole: Weights | None = None
        kind = ""
        for index, (kind, one) in enumerate(_one_by_one(matrices, weight_format)):
            whole = whole or cpu.empty_weights(kind, _shape(matrices))
            whole.put(index, one)
        assert whole is not None
        return kind, whole
    if isinstance(matrices, Blocks):
        packed = cpu.pack_blocks(matrices.data, matrices.kind, _shape(matrices))
        return BLOCK_FORMATS[matrices.kind], packed
    importance = None
    if isinstance(matrices, Weighed):
        matrices, importance = matrices.numbers, matrices.importance
    kind = weight_format or ("bf16" if matrices.dtype == torch.bfloat16 else "f32")
    return kind, cpu.pack(matrices, kind, importance)


def _one_by_one(stack: Stack, weight_format: str | None) -> "Iterator[tuple[str, Weights]]":
    """Read, round and lay out matrix by matrix.

    Raises:
        UserError: they are of several types.
    """
    first = ""
    for index in range(stack.shape[0]):
        kind, packed = _packed(stack.matrix(index), weight_format)
        first = first or kind
        if kind != first:
            raise UserError(
                f"experts of one layer are stored as {first} and as {kind}, which the kernels "
                'cannot hold together; round them to one format, such as quantize="int8"'
            )
        yield kind, packed


def _shape(matrices: Matrices | Stack) -> tuple[int, int, int]:
    outputs, columns = matrices.shape[-2:]
    return matrices.shape[0] if len(matrices.shape) == 3 else 1, outputs, columns


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
