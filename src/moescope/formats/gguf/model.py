"""A model in GGUF, as a source of weights.

Metadata become a `ModelConfig`, and the network's names are looked up as llama.cpp spells them.
Some things are stored otherwise than in safetensors: `kv_b_proj` is split into a transposed key
half and a value half (files before April 2025 keep it whole), experts are stacked already, latent
attention is declared as multi-query attention with one key-value head, and Llama's queries and keys
have their rows in another order.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.errors import UserError, counted
from moescope.formats.gguf.container import GgufFile, damaged
from moescope.formats.gguf.generation import generation_defaults
from moescope.formats.gguf.metadata import IN_LAYER, Fields, architecture_of, model_config
from moescope.formats.gguf.names import PERMUTED, ROPE_FACTORS, SPLIT, stored_name
from moescope.formats.gguf.vocabulary import has_vocabulary, knows_vocabulary, tokenizer
from moescope.kernels.blocks import Blocks
from moescope.text.generation import GenerationDefaults
from moescope.text.tokenizer import Tokenizer

SUFFIX = ".gguf"
MOST_PARTS = 1000
FUSED = "ffn_gate_up_exps.weight"
"""Gate and up of all experts in one tensor."""


def is_gguf(path: Path) -> bool:
    """Whether a name is that of a GGUF file."""
    return path.suffix.lower() == SUFFIX


class GgufModel:
    """The weights of a GGUF model by the network's names, read when asked for.

    Attributes:
        config: the model's shape, without multi-token prediction.
        dtype: to compute in unless asked otherwise; the file's own norms are float32 always.
        files: all parts.
        metadata: of the first part, by key.
        tensors: of all parts, by their names there.

    Raises:
        UserError: a file is missing, damaged, or of a kind that moescope does not know.
    """

    has_blocks = True

    def __init__(self, path: Path) -> None:
        self._path = path
        first = GgufFile(path)
        self.metadata = first.metadata
        self._holders: dict[str, GgufFile] = {}
        parts = [first, *_further_parts(first)]
        self.files = [file.path for file in parts]
        for file in parts:
            for name in file.tensors:
                if name in self._holders:
                    raise damaged(file.path, f"the tensor {name} stands in another part, too")
                self._holders[name] = file
        self._unread = set(self._holders)
        self.tensors = {name: file.tensors[name] for name, file in self._holders.items()}
        factors = self._holders.get(ROPE_FACTORS)
        self.config = model_config(
            path,
            first.metadata,
            self.tensors,
            None if factors is None else factors.read(ROPE_FACTORS, torch.float32).tolist(),
        )
        self._gguf = architecture_of(self.config)
        self.dtype = torch.bfloat16

    def tokenizer(self) -> Tokenizer | None:
        """Return the file's vocabulary, or a `tokenizer.json` beside it where that is unknown.

        None where there is neither.

        Raises:
            UserError: it contradicts itself, or is of a kind that moescope does not know.
        """
        beside = self._path.parent / "tokenizer.json"
        if not knows_vocabulary(self.metadata) and beside.exists():
            return Tokenizer.load(beside)
        if not has_vocabulary(self.metadata):
            return None
        return tokenizer(self._path, self.metadata)

    def generation_defaults(self) -> GenerationDefaults:
        """Return when texts end, and how they are drawn, as the file tells.

        Raises:
            UserError: a value has no meaning.
        """
        return generation_defaults(self._path, self.metadata)

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        """Return the tensor of the network called `name`.

        Args:
            name: in the network's state dict.
            shape: that it must have.
            dtype: of the answer; None takes the narrower of bf16 and float32 that is exact.

        Raises:
            UserError: the file lacks it, or it has another shape.
        """
        prefix, stored = stored_name(name, self._gguf)
        if prefix + stored in self._holders or stored not in SPLIT:
            tensor = self._take(prefix + stored, shape, dtype)
            return self._in_order(name, tensor) if self._permutes(name) else tensor
        first, second = (prefix + half for half in SPLIT[stored])
        if stored == "attn_kv_b.weight":
            return self._joined_kv_b(first, second, shape, dtype)
        return self._joined_experts(first, second, shape, dtype)

    def read_expert(
        self, name: str, expert: int, shape: torch.Size, dtype: torch.dtype | None
    ) -> Tensor:
        """Return one routed expert's matrix.

        Args:
            name: ends in `gate_proj`, `up_proj` or `down_proj`.
            expert: its number.
            shape: `(outputs, columns)` that it must have.
            dtype: as for `read`.

        Raises:
            UserError: as for `read`.
        """
        prefix, stored = stored_name(name, self._gguf)
        count = self.config.required("n_routed_experts")
        fused = prefix + FUSED
        if prefix + stored in self._holders or fused not in self._holders:
            file = self._holder(prefix + stored, torch.Size((count, *shape)))
            return file.read(prefix + stored, dtype, expert)
        file = self._holder(fused, torch.Size((count, 2 * shape[0], shape[1])))
        both = file.read(fused, dtype, expert)
        return both[: shape[0]] if "gate" in stored else both[shape[0] :]

    def blocks(self, name: str, expert: int | None = None) -> Blocks | None:
        """Return what the file holds of a weight; None where it holds it in another arrangement.

        Args:
            name: as for `formats.source.WeightSource.blocks`.
            expert: likewise.
        """
        found = self._blocks(name)
        return found if found is None or expert is None else found.matrix(expert)

    def _blocks(self, name: str) -> Blocks | None:
        prefix, stored = stored_name(name, self._gguf)
        if prefix + stored not in self._holders:
            fused = prefix + FUSED
            if stored not in ("ffn_gate_exps.weight", "ffn_up_exps.weight") or (
                fused not in self._holders
            ):
                return None
            both = self._whole_blocks(fused)
            half = both.shape[1] // 2
            return both.rows(0, half) if "gate" in stored else both.rows(half, 2 * half)
        found = self._whole_blocks(prefix + stored)
        if not self._permutes(name):
            return found
        rows = torch.arange(len(found.data))
        return replace(found, data=found.data[self._in_order(name, rows).numpy()])

    def raw(self, stored: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor by its name in the file."""
        return self._holders[stored].raw(stored)

    def exact(self, stored: str) -> Tensor:
        """Return a tensor by its name in the file, multiplied out."""
        return self._holders[stored].read(stored)

    def _whole_blocks(self, stored: str) -> Blocks:
        self._unread.discard(stored)
        return self._holders[stored].blocks(stored)

    def _permutes(self, name: str) -> bool:
        """Whether a tensor's rows stand so that rotated pairs are neighbours."""
        return self._gguf.permuted and name.rpartition(".")[0].endswith(PERMUTED)

    def _in_order(self, name: str, rows: Tensor) -> Tensor:
        """Move rows of rotated pairs, which are neighbours in the file, into halves of a head."""
        config = self.config
        heads = config.num_key_value_heads if ".k_proj" in name else config.num_attention_heads
        pairs = rows.unflatten(0, (heads, -1, 2))  # (heads, width / 2, 2, ...)
        return pairs.transpose(1, 2).flatten(0, 2).contiguous()

    def _joined_kv_b(
        self, key: str, value: str, shape: torch.Size, dtype: torch.dtype | None
    ) -> Tensor:
        heads, nope = self.config.num_attention_heads, self.config.required("qk_nope_head_dim")
        rank, v_head_dim = shape[1], self.config.required("v_head_dim")
        up_key = self._take(key, torch.Size((heads, rank, nope)), dtype).mT
        up_value = self._take(value, torch.Size((heads, v_head_dim, rank)), dtype)
        return torch.cat([up_key, up_value], dim=1).flatten(0, 1)

    def _joined_experts(
        self, gate: str, up: str, shape: torch.Size, dtype: torch.dtype | None
    ) -> Tensor:
        """Read expert by expert, so that nothing stands in memory twice."""
        half = torch.Size((shape[0], shape[1] // 2, *shape[2:]))
        files = [self._holder(part, half) for part in (gate, up)]
        dtype = dtype or torch.promote_types(files[0].exact(gate), files[1].exact(up))
        stacked = torch.empty(shape, dtype=dtype)
        for expert, matrix in enumerate(stacked):
            for place, part, file in zip(matrix.chunk(2), (gate, up), files, strict=True):
                place.copy_(file.read(part, dtype, expert))
        return stacked

    def _take(self, stored: str, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        return self._holder(stored, shape).read(stored, dtype)

    def _holder(self, stored: str, shape: torch.Size) -> GgufFile:
        """Return the file that a tensor is in, once it is found to have the right shape."""
        if stored not in self._holders:
            raise UserError(
                f"{self._path} lacks the tensor {stored}, which its metadata call for; the file "
                "is incomplete or of a kind that moescope does not know"
            )
        file = self._holders[stored]
        held = file.tensors[stored].shape
        if held != tuple(shape):
            raise UserError(
                f"{self._path}: the tensor {stored} has the shape {held}, but the metadata make "
                f"it {tuple(shape)}; the file is damaged or of a kind that moescope does not know"
            )
        self._unread.discard(stored)
        return file

    def refuse_unread(self) -> None:
        """Refuse tensors that nothing in the network takes; multi-token prediction is left out.

        Raises:
            UserError: there are such; the sentence names one.
        """
        surprising = sorted(
            name
            for name in self._unread
            if _layer_of(name) < self.config.num_hidden_layers and name != ROPE_FACTORS
        )
        if surprising:
            raise UserError(
                f"{self._path} holds {counted(len(surprising), 'tensor')} that moescope's "
                f"{self.config.model_type} has no place for, such as {surprising[0]}"
            )


def _further_parts(first: GgufFile) -> Iterator[GgufFile]:
    """Open the files `...-00002-of-0000N.gguf` and on, where `first` is `...-00001-of-...`."""
    parts = Fields(first.path, first.metadata).get("split.count", int, 1)
    if parts == 1:
        return
    if not 1 < parts <= MOST_PARTS:
        raise damaged(first.path, f"it is one of {parts} parts")
    ending = f"-00001-of-{parts:05d}{SUFFIX}"
    name = first.path.name
    if not name.endswith(ending):
        raise UserError(
            f"{first.path} is one part of {parts}; name the one that ends in {ending}, with the "
            "others beside it"
        )
    for number in range(2, parts + 1):
        part = f"{name.removesuffix(ending)}-{number:05d}-of-{parts:05d}{SUFFIX}"
        yield GgufFile(first.path.with_name(part))


def _layer_of(stored: str) -> int:
    """Return the layer of a tensor in a file, -1 for none."""
    found = IN_LAYER.match(stored)
    return int(found[1]) if found else -1
