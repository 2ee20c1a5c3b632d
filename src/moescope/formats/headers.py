"""What a checkpoint holds, from its headers alone: a type, a shape and a size for every tensor.

The files may lie in a folder or on the Hub; of either, no weight is read.
"""

import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.formats.gguf.container import GgufHeader, UnfinishedHeader, damaged
from moescope.formats.gguf.metadata import model_config

FIRST_BYTES = {"safetensors": 1 << 16, "gguf": 1 << 20}
"""Of a file that are read at first: most headers are shorter. A GGUF's holds the vocabulary."""
GROWTH = 4
MAX_CONFIG_BYTES = 1 << 26
MAX_HEADER_BYTES = {"safetensors": 100_000_000, "gguf": 1 << 28}
READERS = 8
"""Headers that are read at a time: a large model has more than a hundred files."""

SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
"""One of several GGUF files that make a model."""
_LAYER = re.compile(r"\b(?:layers|blk)\.(\d{1,9})\.")
_MXFP4 = ("_blocks", "_scales")
"""How the names of gpt-oss's 4-bit blocks, and of their scales, end; their type says U8."""

_FOREIGN = {
    ".qweight": "GPTQ's or AWQ's",
    ".weight_packed": "compressed-tensors'",
    ".weight.absmax": "bitsandbytes'",
}
"""How the names of weights that others packed end, or of what lies beside them."""


class Files(Protocol):
    """A checkpoint's files, parts of which can be read."""

    def size(self, name: str) -> int:
        """Return a file's bytes."""
        ...

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes of a file from `start` to before `stop`."""
        ...

    def shown(self, name: str) -> Path:
        """Return what messages call a file."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is stored.

    Attributes:
        shape: rows before columns.
        kind: its type, as the format spells it: `BF16`, `F8_E4M3`, `Q4_K`.
        size: bytes.
    """

    shape: tuple[int, ...]
    kind: str
    size: int


@dataclass(frozen=True)
class Headers:
    """A checkpoint without its weights.

    Attributes:
        config: the shape.
        tensors: by the name that each is stored under, without multi-token prediction.
    """

    config: ModelConfig
    tensors: dict[str, StoredTensor]

    @property
    def has_blocks(self) -> bool:
        """Whether the native kernels hold its weights as they are stored."""
        kinds = {held.kind for held in self.tensors.values()}
        return "token_embd.weight" in self.tensors or bool(kinds & {"F8_E4M3", "MXFP4"})

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in unless asked otherwise: the type of its final norm."""
        norm = self.tensors.get("model.norm.weight")
        return torch.float32 if norm is not None and norm.kind == "F32" else torch.bfloat16

    @classmethod
    def of(cls, config: ModelConfig, tensors: Iterable[tuple[str, StoredTensor]]) -> "Headers":
        """Leave out what stands behind the last layer: that is multi-token prediction."""
        layers = config.num_hidden_layers
        return cls(config, {name: held for name, held in tensors if _layer_of(name) < layers})


class LocalFiles:
    """The files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def size(self, name: str) -> int:
        """Return a file's bytes.

        Raises:
            UserError: there is no such file.
        """
        try:
            return self.shown(name).stat().st_size
        except OSError as error:
            raise UserError(
                f"cannot read {self.shown(name)} ({error.strerror}); fetch the model again"
            ) from error

    def read(self, name: str, start: int, stop: int) -> bytes:
        with self.shown(name).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def shown(self, name: str) -> Path:
        return self._folder / name


def safetensors_headers(files: Files, config: ModelConfig, names: Sequence[str]) -> Headers:
    """Read the headers of safetensors files.

    Args:
        files: where they lie.
        config: the model's.
        names: of the files.

    Raises:
        UserError: one of them is damaged, or others packed the weights (`refuse_foreign`).
    """
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(partial(_safetensors_header, files), names))
    for name, tensors in zip(names, read, strict=True):
        refuse_foreign(tensors, files.shown(name))
    return Headers.of(config, (item for tensors in read for item in tensors.items()))


def refuse_foreign(names: Iterable[str], where: Path) -> None:
    """Refuse weights in a form that others pack them in.

    Args:
        names: of the tensors in a safetensors file.
        where: it lies, for the message.

    Raises:
        UserError: one of them tells of such a form.
    """
    for name in names:
        for ending, whose in _FOREIGN.items():
            if name.endswith(ending):
                raise UserError(
                    f"{where}: the tensor {name.removesuffix(ending)}.weight has {whose} form, "
                    "which moescope does not read; take the model as it was published in bf16 or "
                    "FP8, or as GGUF"
                )


def gguf_headers(files: Files, names: Sequence[str]) -> Headers:
    """Read the headers of a GGUF file, or of those that a model was split into.

    Args:
        files: where they lie.
        names: of the files, in order.

    Raises:
        UserError: one of them is damaged, or of a kind that moescope does not know.
    """
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(partial(_gguf_header, files), names))
    infos = {name: info for header in read for name, info in header.tensors.items()}
    config = model_config(files.shown(names[0]), read[0].metadata, infos)
    tensors = ((n, StoredTensor(info.shape, info.kind, info.size)) for n, info in infos.items())
    return Headers.of(config, tensors)


def read_object(files: Files, name: str) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        UserError: it is too long, no JSON, or no object.
    """
    size = files.size(name)
    if size > MAX_CONFIG_BYTES:
        raise UserError(f"{files.shown(name)} has {size} bytes, more than a config or an index has")
    try:
        fields = json.loads(files.read(name, 0, size))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {files.shown(name)} as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{files.shown(name)} holds no JSON object; a model's config is one")
    return cast(dict[str, Any], fields)


def split_names(name: str) -> list[str]:
    """Return the names of all files that belong to a GGUF, in order; of most, that is one."""
    found = SPLIT.fullmatch(name)
    if found is None:
        return [name]
    count = int(found[3])
    return [f"{found[1]}-{number:05d}-of-{found[3]}.gguf" for number in range(1, count + 1)]


def _layer_of(name: str) -> int:
    found = _LAYER.search(name)
    return int(found[1]) if found else -1


def _gguf_header(files: Files, name: str) -> GgufHeader:
    path, size = files.shown(name), files.size(name)
    data = files.read(name, 0, min(FIRST_BYTES["gguf"], size))
    while True:
        try:
            return GgufHeader(path, data, size)
        except UnfinishedHeader:
            if len(data) >= MAX_HEADER_BYTES["gguf"]:
                raise damaged(path, f"its header is longer than {len(data)} bytes") from None
            data += files.read(name, len(data), min(len(data) * GROWTH, size))


def _safetensors_header(files: Files, name: str) -> dict[str, StoredTensor]:
    """Read the tensors of a file.

    Format: https://huggingface.co/docs/safetensors
    """
    size = files.size(name)
    data = files.read(name, 0, min(FIRST_BYTES["safetensors"], size))
    try:
        (length,) = struct.unpack_from("<Q", data)
        end = 8 + length
        if length > MAX_HEADER_BYTES["safetensors"] or end > size:
            raise ValueError(f"it announces a header of {length} bytes")
        if end > len(data):
            data += files.read(name, len(data), end)
        entries: dict[str, Any] = json.loads(data[8:end])
        found = {
            tensor: _stored(tensor, entry, size - end)
            for tensor, entry in entries.items()
            if tensor != "__metadata__"
        }
        return found | dict(_fp4(found))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise UserError(
            f"{files.shown(name)} is no intact safetensors file ({error}); fetch the model again"
        ) from error


def _fp4(tensors: dict[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield DeepSeek-V4's experts, two numbers of MXFP4 in an I8, with their scales."""
    for name, held in tensors.items():
        scale = name.removesuffix("weight") + "scale"
        if held.kind == "I8" and scale in tensors and tensors[scale].kind == "F8_E8M0":
            yield name, replace(held, kind="MXFP4")
            yield scale, replace(tensors[scale], kind="MXFP4")


def _stored(name: str, entry: dict[str, Any], room: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    kind, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
    if not 0 <= start <= stop <= room:
        raise ValueError(f"{name} stands from {start} to {stop}, of {room}")
    packed = kind == "U8" and name.endswith(_MXFP4)
    return StoredTensor(shape, "MXFP4" if packed else str(kind), stop - start)
