"""Any model that opens, rounded and written: as a GGUF file, or as a folder."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from torch import Tensor

from moescope.checkpoint import open_checkpoint, refuse_if_not_finite
from moescope.errors import UserError
from moescope.families import save_config
from moescope.files import atomic_folder, atomic_path
from moescope.formats.gguf.container import TensorInfo
from moescope.formats.gguf.file_types import FILE_TYPES, NARROWER_BLOCKS, tensor_type
from moescope.formats.gguf.generation import SAMPLING_KEYS
from moescope.formats.gguf.model import GgufModel, is_gguf
from moescope.formats.gguf.vocabulary_of import vocabulary_of
from moescope.formats.gguf.writer import (
    add_info,
    encode,
    refuse_if_disk_is_full,
    write_gguf,
    write_header,
)
from moescope.formats.safetensors import save_tensors
from moescope.formats.source import WeightSource
from moescope.kernels import cpu
from moescope.model.decoder import without_numbers

FOLDER_TYPES = {"bf16": torch.bfloat16, "int8": torch.int8}
"""What a folder's weights can be rounded to; `transformers` opens the first."""

PLAIN = ("f32", "bf16", "f16")
OWN_KEYS = ("GGUF.", "split.", "general.file_type", "general.quantization_version")
"""Beginnings of what is written anew, or lost its meaning."""

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Written:
    """What came of it.

    Attributes:
        path: file or folder.
        to: what was asked for.
        bytes: of all weights.
        bits_per_weight: on average.
        types: how many tensors have which type.
        unfit: how many rows' widths did not suit the type that they were to have.
    """

    path: Path
    to: str
    bytes: int
    bits_per_weight: float
    types: Mapping[str, int]
    unfit: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {**vars(self), "path": str(self.path), "types": dict(self.types)}


def quantize(source: Path, to: str, out: Path, tell: Tell | None = None) -> Written:
    """Round the model at `source` and write it to `out`, atomically.

    Args:
        source: a folder or GGUF file.
        to: one of `FILE_TYPES` for a GGUF file, of `FOLDER_TYPES` for a folder.
        out: ends in .gguf for a file; is not there yet.
        tell: called with how much is done, and how much there is to do.

    Raises:
        UserError: `to` does not suit `out`, `out` is there already, the model lacks what the file
            must hold, a weight is no number, or the disk is full.
    """
    _refuse(to, out)
    checkpoint = open_checkpoint(source)
    if not is_gguf(out):
        return _folder(checkpoint, to, out, tell)
    if isinstance(checkpoint, GgufModel):
        held = _copied(checkpoint, source, to, out, tell)
    else:
        held = _made(checkpoint, to, out, tell)
    size = sum(info.size for info in held.values())
    weights = sum(torch.Size(info.shape).numel() for info in held.values())
    wanted = FILE_TYPES[to].kind
    fallbacks = {kind.name for kind in NARROWER_BLOCKS.values()} | {"F16"}
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    unfit = sum(
        info.kind in fallbacks and info.kind != wanted.name and info.shape[-1] % block != 0
        for info in held.values()
    )
    types = Counter(info.kind for info in held.values())
    return Written(out, to, size, 8 * size / weights, types, unfit)


def _refuse(to: str, out: Path) -> None:
    in_file = is_gguf(out)
    known = FILE_TYPES if in_file else FOLDER_TYPES
    if to not in known:
        if not in_file and to in FILE_TYPES:
            raise UserError(
                f"a folder holds no {to}; name a file that ends in .gguf, or choose from "
                f"{', '.join(FOLDER_TYPES)}"
            )
        if to == "int4":
            raise UserError(
                "int4 is the native kernels' own form; write q4_k_m into a .gguf file, or open "
                'any model with quantize="int4" (--quantize int4)'
            )
        if in_file and to in FOLDER_TYPES:
            raise UserError(f"a GGUF file holds no {to}; choose from {', '.join(FILE_TYPES)}")
        raise UserError(f"there is no {to!r} to round to; choose from {', '.join(known)}")
    if in_file and to not in PLAIN and not cpu.available():
        raise UserError(
            "GGUF's blocks are made by the native kernels, which were not built here; choose "
            f"from {', '.join(PLAIN)}, or install moescope where there is a C++ compiler"
        )
    if out.exists():
        raise UserError(f"{out} is there already; remove it or choose another name")


# --- into a GGUF file ------------------------------------------------------------------------


def _made(
    checkpoint: WeightSource, to: str, out: Path, tell: Tell | None
) -> Mapping[str, TensorInfo]:
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise UserError(
            "a GGUF file holds the model's tokenizer, and there is none; put its tokenizer.json "
            "beside the weights"
        )
    defaults = checkpoint.generation_defaults()
    shapes = _shapes(checkpoint)
    return write_gguf(
        checkpoint.config,
        shapes,
        lambda name: _finite(name, checkpoint.read(name, shapes[name], None)),
        out,
        to,
        vocabulary=vocabulary_of(tokenizer, checkpoint.config, defaults),
        mixed=True,
        sampling={SAMPLING_KEYS[name]: value for name, value in defaults.sampling.items()},
        tell=tell,
    )


def _copied(
    checkpoint: GgufModel, source: Path, to: str, out: Path, tell: Tell | None
) -> Mapping[str, TensorInfo]:
    """Keep metadata and vocabulary; tensors that have the wanted type already stay as they are."""
    config, file_type = checkpoint.config, FILE_TYPES[to]
    tensors = checkpoint.tensors
    kinds = {
        name: tensor_type(
            name,
            info.shape,
            file_type,
            config.num_hidden_layers,
            config.n_routed_experts or 0,
            "output.weight" not in tensors,
        )
        for name, info in tensors.items()
    }
    with atomic_path(out) as partial:
        writer = GGUFWriter(partial, str(checkpoint.metadata["general.architecture"]))
        for key, field in GGUFReader(source).fields.items():
            if not key.startswith(OWN_KEYS) and key != "general.architecture":
                inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), field.types[0], inner)
        writer.add_file_type(file_type.number)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        held = {
            name: add_info(writer, name, info.shape, kinds[name]) for name, info in tensors.items()
        }
        refuse_if_disk_is_full(out, held)
        write_header(writer)
        total = sum(info.size for info in held.values())
        done = 0
        for name, kind in kinds.items():
            if tensors[name].kind == kind.name:
                writer.write_tensor_data(checkpoint.raw(name))
            else:
                writer.write_tensor_data(encode(_finite(name, checkpoint.exact(name)), kind))
            done += held[name].size
            if tell is not None:
                tell(done, total)
        writer.close()
    return held


# --- into a folder -----------------------------------------------------------------------------


def _folder(checkpoint: WeightSource, to: str, out: Path, tell: Tell | None) -> Written:
    """Write a folder beside its place, and rename it."""
    shapes = _shapes(checkpoint)
    total = sum(shape.numel() for shape in shapes.values())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        done = 0
        for name, shape in shapes.items():
            yield name, _finite(name, checkpoint.read(name, shape, None))
            done += shape.numel()
            if tell is not None:
                tell(done, total)

    with atomic_folder(out) as partial:
        save_tensors(checkpoint.config, tensors(), partial, dtype=FOLDER_TYPES[to])
        save_config(checkpoint.config, partial / "config.json")
        checkpoint.generation_defaults().save(partial)
        tokenizer = checkpoint.tokenizer()
        if tokenizer is not None:
            tokenizer.save(partial)
    files = [file for file in out.iterdir() if file.suffix == ".safetensors"]
    size = sum(file.stat().st_size for file in files)
    return Written(out, to, size, 8 * size / total, {to: len(shapes)}, 0)


def _finite(name: str, weight: Tensor) -> Tensor:
    """Return a weight; rounding would make numbers of what is none."""
    refuse_if_not_finite(name, weight)
    return weight


def _shapes(checkpoint: WeightSource) -> dict[str, torch.Size]:
    tied = checkpoint.config.tie_word_embeddings
    return {
        name: slot.shape
        for name, slot in without_numbers(checkpoint.config).state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
