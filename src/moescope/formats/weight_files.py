"""The tensors of a folder's safetensors files by name, in each number format that is in use."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moescope.config import ModelConfig
from moescope.errors import UserError, counted
from moescope.families.family import Tensors
from moescope.formats.headers import refuse_foreign
from moescope.formats.scaled import (
    FP4_BLOCK,
    FP8_BLOCK,
    dequantize_fp4,
    dequantize_fp8,
    exponents,
    fp8_blocks,
    mxfp4_blocks,
)
from moescope.kernels.blocks import Blocks
from moescope.kernels.quantize import dequantize_int8

INDEX = "model.safetensors.index.json"
INT8_SCALE, FP8_SCALE = "_scale", "_scale_inv"
FP4_BLOCKS, FP4_SCALES = "_blocks", "_scales"
"""How the names of gpt-oss's experts in MXFP4, and of their scales, end."""


class WeightFiles:
    """All tensors of a folder by name, memory-mapped, and which of them were read."""

    def __init__(self, folder: Path, layout: Tensors) -> None:
        self._folder = folder
        self._unused = layout.unused
        self._handles: dict[str, tuple[Any, str]] = {}  # a file, and the name in it
        self.paths = self._paths()
        for path in self.paths:
            try:
                handle: Any = safe_open(path, framework="pt")
                names: list[str] = list(handle.keys())
            except FileNotFoundError:
                raise UserError(
                    f"{path} is missing, though {INDEX} names it; fetch the model again"
                ) from None
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is no intact safetensors file ({error}); fetch the model again"
                ) from error
            refuse_foreign(names, path)
            self._handles |= {begun(name, layout.beginnings): (handle, name) for name in names}
        prefix = layout.prefix
        if prefix and any(name.startswith(prefix) for name in self._handles):
            # One part of a larger model: the rest, such as what sees pictures, is not opened.
            self._handles = {
                name.removeprefix(prefix): held
                for name, held in self._handles.items()
                if name.startswith(prefix)
            }
        self._unread = set(self._handles)

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def _paths(self) -> list[Path]:
        index = self._folder / INDEX
        if index.exists():
            try:
                weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
                return [self._folder / Path(file).name for file in sorted(set(weight_map.values()))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is damaged ({error}); fetch the model again") from error
        found = sorted(self._folder.glob("*.safetensors"))
        if not found:
            pickles = [*self._folder.glob("*.bin"), *self._folder.glob("*.pt")]
            held = "only pickle files, which can run code when opened" if pickles else "no weights"
            raise UserError(
                f"{self._folder} holds {held}; moescope opens safetensors, so convert the model "
                "or fetch its safetensors"
            )
        return found

    def dtype(self, name: str) -> torch.dtype:
        """Return the type that a tensor is stored in."""
        return self._get(name).dtype

    def exact(self, name: str) -> torch.dtype:
        """Return the narrower of bf16 and float32 that loses nothing of a tensor."""
        if name not in self:
            return torch.float32
        is_bf16 = self._get(name).dtype == torch.bfloat16
        return torch.bfloat16 if is_bf16 else torch.float32

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        """Return a tensor in `dtype`, or the exact one, multiplied out if it is quantised."""
        tensor = self._get(name)
        if dtype == torch.int64 and not tensor.is_floating_point() and tensor.shape == shape:
            return tensor.long()
        dtype = dtype or self.exact(name)
        if tensor.dtype == torch.int8 and tensor.ndim == 2 and len(tensor) == shape[0]:
            columns = 2 * tensor.shape[1]
            if columns == shape[1]:
                scale = self._scale(_block_scale(name, self), (shape[0], columns // FP4_BLOCK))
                return dequantize_fp4(tensor, scale, dtype)
        if tensor.shape != shape:
            raise UserError(
                f"{self._folder}: the tensor {name} has the shape {tuple(tensor.shape)}, but "
                f"config.json makes it {tuple(shape)}; the two belong to different models"
            )
        if tensor.dtype == torch.int8 and tensor.ndim == 2:
            return dequantize_int8(tensor, self._scale(name + INT8_SCALE, (len(tensor), 1)), dtype)
        if tensor.dtype == torch.float8_e4m3fn and tensor.ndim == 2:
            blocks = tuple(-(-size // FP8_BLOCK) for size in tensor.shape)
            return dequantize_fp8(tensor, self._scale(_block_scale(name, self), blocks), dtype)
        if not tensor.is_floating_point():
            raise UserError(
                f"{self._folder}: the tensor {name} holds {tensor.dtype}, which is no weight "
                "that moescope reads"
            )
        return tensor.to(dtype)

    def has_blocks(self) -> bool:
        """Whether some weights are FP8 or MXFP4."""
        if any(name.endswith(FP4_BLOCKS) for name in self._handles):
            return True
        slices = (handle.get_slice(stored) for handle, stored in self._handles.values())
        return any(held.get_dtype() in ("F8_E4M3", "F8_E8M0") for held in slices)

    def blocks(self, name: str) -> Blocks | None:
        """Return a matrix in FP8 or MXFP4 as it is stored; None for others."""
        if name not in self._handles:
            return None
        handle, stored = self._handles[name]
        kind = handle.get_slice(stored).get_dtype()
        if kind not in ("F8_E4M3", "I8"):
            return None
        weight = self._get(name)
        scale = _block_scale(name, self)
        if weight.ndim != 2 or scale not in self:
            return None
        rows, columns = weight.shape
        if kind == "I8":
            return mxfp4_blocks(weight, self._scale(scale, (rows, 2 * columns // FP4_BLOCK)))
        shape = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
        return fp8_blocks(weight, self._scale(scale, shape))

    def stacked_blocks(self, name: str, expert: int, rows: slice) -> Blocks | None:
        """Return some rows of one of the experts that a tensor of MXFP4 holds."""
        if name + FP4_BLOCKS not in self:
            return None
        packed, scale = self._mxfp4(name, expert)
        return mxfp4_blocks(packed[rows].flatten(1), scale[rows])

    def read_stacked(
        self,
        name: str,
        expert: int,
        rows: slice,
        shape: torch.Size,
        dtype: torch.dtype | None,
        transposed: bool,
    ) -> Tensor:
        """Return some rows of one of the experts that a tensor holds."""
        if name + FP4_BLOCKS in self:
            packed, scale = self._mxfp4(name, expert)
            matrix = dequantize_fp4(packed.flatten(1), exponents(scale), dtype or torch.float32)
        else:
            matrix = self._get(name, expert)
            if not matrix.is_floating_point() or matrix.ndim != 2:
                raise UserError(
                    f"{self._folder}: the tensor {name} holds {matrix.dtype} of the shape "
                    f"{tuple(matrix.shape)} an expert, which is no weight that moescope reads"
                )
            matrix = (matrix.mT if transposed else matrix).to(dtype or self.exact(name))
        if matrix[rows].shape != shape:
            raise UserError(
                f"{self._folder}: an expert of the tensor {name} has the shape "
                f"{tuple(matrix[rows].shape)}, but config.json makes it {tuple(shape)}; the two "
                "belong to different models"
            )
        return matrix[rows].contiguous()

    def read_mxfp4(self, name: str, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        """Return all experts of a tensor of MXFP4, multiplied out, rows as they are stored."""
        stacked = torch.empty(shape, dtype=dtype or torch.float32)
        for expert, place in enumerate(stacked):
            rows = self.read_stacked(name, expert, slice(None), place.shape, place.dtype, False)
            place.copy_(rows)
        return stacked

    def _mxfp4(self, name: str, expert: int) -> tuple[Tensor, Tensor]:
        """Return an expert's `(outputs, groups, 16)` bytes of numbers and `(outputs, groups)`."""
        packed, scale = (self._get(name + end, expert) for end in (FP4_BLOCKS, FP4_SCALES))
        bytes_alone = packed.dtype == scale.dtype == torch.uint8
        if not bytes_alone or packed.shape != (*scale.shape, FP4_BLOCK // 2):
            raise UserError(
                f"{self._folder}: the tensors {name}{FP4_BLOCKS} and {name}{FP4_SCALES} do not "
                "belong together; fetch the model again"
            )
        return packed, scale

    def _scale(self, name: str, shape: tuple[int, ...]) -> Tensor:
        scale = self._get(name)
        if scale.shape != shape or not scale.is_floating_point():
            raise UserError(
                f"{self._folder}: the tensor {name} is {scale.dtype} of the shape "
                f"{tuple(scale.shape)}, but the weight that it scales makes it {shape}"
            )
        return scale

    def refuse_unread(self, config: ModelConfig) -> None:
        """Refuse tensors that nothing in the network takes.

        Rotary frequencies, a tied head's copy and unused multi-token prediction are no surprise.
        """
        behind = [f"model.layers.{config.num_hidden_layers + depth}." for depth in range(8)]
        surprising = sorted(
            name
            for name in self._unread
            if not name.endswith("rotary_emb.inv_freq")
            and not name.startswith((*behind, *self._unused))
            and not (name == "lm_head.weight" and config.tie_word_embeddings)
        )
        if surprising:
            raise UserError(
                f"{self._folder} holds {counted(len(surprising), 'tensor')} that a "
                f"{config.model_type} model "
                f"of this config.json does not have, such as {surprising[0]}; check that config "
                "and weights belong together"
            )

    def _get(self, name: str, entry: int | None = None) -> Tensor:
        """Read a tensor, or one entry of its first dimension."""
        if name not in self._handles:
            raise UserError(
                f"{self._folder} lacks the tensor {name}, which its config.json calls for; the "
                "files are incomplete or belong to another model"
            )
        self._unread.discard(name)
        try:
            handle, stored = self._handles[name]
            if entry is None:
                return handle.get_tensor(stored)
            return handle.get_slice(stored)[entry]
        except (SafetensorError, OSError, IndexError) as error:
            raise UserError(
                f"{self._folder}: the tensor {name} cannot be read ({error}); fetch the model again"
            ) from error


def begun(name: str, beginnings: Mapping[str, str]) -> str:
    """Replace the beginning of a name where it is one of those given."""
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _block_scale(name: str, names: "WeightFiles") -> str:
    """Return the name of the scales of a weight's blocks, as V3 or as V4 calls them."""
    short = name.removesuffix("weight") + "scale"
    return short if short in names else name + FP8_SCALE
