"""Safetensors as publishers write and `transformers` reads them, in and out.

The network's names become a family's own (`families`); multi-token-prediction depths stand as
layers behind the last.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moescope.config import ModelConfig
from moescope.families import FAMILIES, open_config
from moescope.families.family import ExpertTensors
from moescope.files import atomic_path, write_text
from moescope.formats.source import DOWN, GATE, GATE_UP, GATE_UP_BIAS
from moescope.formats.weight_files import FP4_BLOCKS, INDEX, INT8_SCALE, WeightFiles, begun
from moescope.kernels.blocks import Blocks
from moescope.kernels.quantize import quantize_int8
from moescope.text.generation import GenerationDefaults
from moescope.text.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
CORRECTION_BIAS = "e_score_correction_bias"
STREAMS = tuple(f"{at}{part}" for at in ("_hc.", "hc_head.hc_") for part in ("fn", "base", "scale"))
WIDE = (CORRECTION_BIAS, "sinks", "position_bias", *STREAMS)
"""How names of small tensors end that are kept in float32 whatever the type of the others."""


def save_tensors(
    config: ModelConfig,
    tensors: Iterator[tuple[str, Tensor]],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write weights into `folder` by their family's names, each file atomically.

    Args:
        config: of the network.
        tensors: by the network's names.
        folder: made if it is not there.
        dtype: type of the weights; None keeps each tensor's own. `torch.int8` stores matrices as
            integers with a float32 scale a row (`<name>_scale`), which moescope alone reads.
        max_shard_bytes: larger models are split into several files with an index.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    shards: list[dict[str, Tensor]] = [{}]
    held = 0  # bytes in the last of them
    beginnings = FAMILIES[config.model_type].tensors.beginnings
    back = {ours: theirs for theirs, ours in beginnings.items()}
    for name, tensor in _published_tensors(config, tensors):
        name = begun(name, back)
        encoded = _encode(name, tensor.detach(), dtype)
        size = sum(t.nbytes for t in encoded.values())
        if held and held + size > max_shard_bytes:
            shards.append({})
            held = 0
        shards[-1] |= encoded
        held += size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else WEIGHTS
        with atomic_path(folder / file) as partial:
            save_file(shard, partial, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if shards[1:]:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
    (folder / (WEIGHTS if shards[1:] else INDEX)).unlink(missing_ok=True)


# --- names ---------------------------------------------------------------------------------------


def _published_tensors(
    config: ModelConfig, tensors: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    layout = FAMILIES[config.model_type].tensors
    for name, tensor in tensors:
        if name.endswith((GATE_UP, DOWN)):
            layer = _layer_of(published_name(name, config))
            yield from _published_experts(layer, name.endswith(DOWN), tensor, layout.experts)
            continue
        published = published_name(name, config)
        part = published.removeprefix(_layer_of(published))
        if name.endswith(GATE_UP_BIAS) and layout.experts.transposed:
            tensor = _taking_turns(tensor)
        yield published, tensor[None] if part in layout.leading else tensor


def _published_experts(
    layer: str, is_down: bool, tensor: Tensor, layout: ExpertTensors
) -> Iterator[tuple[str, Tensor]]:
    if layout.gate_up is not None:
        name = layer + (layout.down if is_down else layout.gate_up)
        yield name, _transposed(tensor, is_down) if layout.transposed else tensor
        return
    for expert, matrix in enumerate(tensor):
        if is_down:
            yield layer + layout.down.format(expert=expert), matrix
        else:
            gate, up = matrix.chunk(2)
            yield layer + layout.gate.format(expert=expert), gate
            yield layer + layout.up.format(expert=expert), up


def _transposed(stacked: Tensor, is_down: bool) -> Tensor:
    """Turn `(experts, outputs, columns)` round, gate and up rows taking turns."""
    return (stacked if is_down else _taking_turns(stacked)).mT.contiguous()


def _turned_back(stacked: Tensor, is_down: bool) -> Tensor:
    """Undo `_transposed`."""
    return stacked.mT.contiguous() if is_down else _one_after_another(stacked.mT)


def _taking_turns(stacked: Tensor) -> Tensor:
    """Let the outputs of gate and up `(experts, outputs, ...)` take turns."""
    gate, up = stacked.chunk(2, dim=1)
    return torch.stack([gate, up], dim=2).flatten(1, 2)


def _one_after_another(stacked: Tensor) -> Tensor:
    """Undo `_taking_turns`."""
    return torch.cat([stacked[:, 0::2], stacked[:, 1::2]], dim=1)


def published_name(name: str, config: ModelConfig) -> str:
    """Where a tensor of the network stands in a checkpoint; stacked experts keep their name."""
    if name.startswith("mtp.depths."):
        depth, part = name.removeprefix("mtp.depths.").split(".", 1)
        layer = f"model.layers.{config.num_hidden_layers + int(depth)}."
        part = f"shared_head.{part}" if part.startswith("norm.") else part.removeprefix("layer.")
    else:
        layer = _layer_of(name)
        part = name.removeprefix(layer)
    return layer + FAMILIES[config.model_type].tensors.in_layer.get(part, part)


def _layer_of(name: str) -> str:
    """Return `model.layers.N.`, or nothing where a tensor stands outside of the layers."""
    parts = name.split(".", 3)
    return ".".join(parts[:3]) + "." if parts[:2] == ["model", "layers"] else ""


# --- number formats ------------------------------------------------------------------------------


def _encode(name: str, tensor: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    if dtype is None or name.endswith(CORRECTION_BIAS) or not tensor.is_floating_point():
        return {name: tensor.contiguous()}
    if dtype != torch.int8:
        return {name: tensor.to(dtype).contiguous()}
    if tensor.ndim == 1:
        return {name: tensor.to(torch.bfloat16)}
    integers, scale = quantize_int8(tensor)
    return {name: integers, name + INT8_SCALE: scale}


# --- files ---------------------------------------------------------------------------------------


class SafetensorsModel:
    """A folder's config and weights; files are memory-mapped, a tensor is read when asked for.

    Attributes:
        config: the shape, without multi-token prediction where the files lack it.
        dtype: that of the final norm.
        files: config, index and weights.

    Raises:
        UserError: there is no config or no safetensors, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = open_config(folder / "config.json")
        self._layout = FAMILIES[config.model_type].tensors
        self._files = WeightFiles(folder, self._layout)
        if f"model.layers.{config.num_hidden_layers}.eh_proj.weight" not in self._files:
            config = config.model_copy(update={"num_nextn_predict_layers": 0})
        self.config = config
        self.dtype = self._files.dtype("model.norm.weight")
        self.files = [folder / "config.json", *self._files.paths]

    def tokenizer(self) -> Tokenizer | None:
        """Return the vocabulary of the folder; None where there is none."""
        has_one = (self._folder / "tokenizer.json").exists()
        return Tokenizer.load(self._folder) if has_one else None

    def generation_defaults(self) -> GenerationDefaults:
        """Return what the folder's `generation_config.json` says."""
        return GenerationDefaults.load(self._folder)

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        """Return the tensor of the network called `name`, stacking experts where it holds several.

        Args:
            name: in the network's state dict.
            shape: that it must have.
            dtype: of the answer; None takes the narrower of bf16 and float32 that is exact.

        Raises:
            UserError: the files lack it, it has another shape, or it cannot be read.
        """
        published = published_name(name, self.config)
        if published in self._files or not name.endswith((GATE_UP, DOWN)):
            return self._read(published, shape, dtype, name.endswith((GATE_UP, DOWN)))
        layer, layout = _layer_of(published), self._layout.experts
        if layout.gate_up is not None:
            published = layer + (layout.down if name.endswith(DOWN) else layout.gate_up)
            return self._read(published, shape, dtype, True)
        parts = (layout.down,) if name.endswith(DOWN) else (layout.gate, layout.up)
        dtype = dtype or self._files.exact(layer + parts[0].format(expert=0))
        stacked = torch.empty(shape, dtype=dtype)
        for expert, matrix in enumerate(stacked):
            for place, part in zip(matrix.chunk(len(parts)), parts, strict=True):
                file_name = layer + part.format(expert=expert)
                place.copy_(self._files.read(file_name, place.shape, dtype))
        return stacked

    def _read(
        self, published: str, shape: torch.Size, dtype: torch.dtype | None, experts: bool
    ) -> Tensor:
        """Read one tensor of the files, in the network's arrangement."""
        part = published.removeprefix(_layer_of(published))
        if part in self._layout.leading and published in self._files:
            return self._files.read(published, torch.Size((1, *shape)), dtype)[0]
        if experts and published + FP4_BLOCKS in self._files:
            tensor = self._files.read_mxfp4(published, shape, dtype)
            return tensor if published.endswith(DOWN) else _one_after_another(tensor)
        if not experts or not self._layout.experts.transposed:
            tensor = self._files.read(published, shape, dtype)
            turns = self._layout.experts.transposed and published.endswith(GATE_UP_BIAS)
            return _one_after_another(tensor) if turns else tensor
        turned = self._files.read(published, torch.Size((shape[0], shape[2], shape[1])), dtype)
        return _turned_back(turned, published.endswith(DOWN))

    @property
    def has_blocks(self) -> bool:
        """Whether `blocks` returns some of the weights: those in FP8 and MXFP4."""
        return self._files.has_blocks()

    def blocks(self, name: str, expert: int | None = None) -> Blocks | None:
        """Return FP8 and MXFP4 as they are; None for weights of other types.

        Args:
            name: as for `formats.source.WeightSource.blocks`.
            expert: its number, where the name is that of routed experts.
        """
        if expert is None:
            return self._files.blocks(published_name(name, self.config))
        place = self._expert(name, expert)
        if isinstance(place, str):
            return self._files.blocks(place)
        stacked, part = place
        return self._files.stacked_blocks(stacked, expert, part)

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
        place = self._expert(name, expert)
        if isinstance(place, str):
            return self._files.read(place, shape, dtype)
        stacked, part = place
        transposed = self._layout.experts.transposed
        return self._files.read_stacked(stacked, expert, part, shape, dtype, transposed)

    def _expert(self, name: str, expert: int) -> "str | tuple[str, slice]":
        """Return an expert's own tensor, or that of all experts and its rows in there."""
        at, _, part = name.rpartition(".")
        is_down = f".experts.{part}" == DOWN
        own = published_name(at + (".down_proj" if is_down else ".gate_up_proj"), self.config)
        layout, layer = self._layout.experts, _layer_of(own)
        if own not in self._files:
            if layout.gate_up is None:
                pattern = {GATE: layout.gate, DOWN: layout.down}.get(f".experts.{part}", layout.up)
                return layer + pattern.format(expert=expert)
            own = layer + (layout.down if is_down else layout.gate_up)
        if is_down:
            return own, slice(None)
        is_up, count = part == "up_proj", self.config.required("moe_intermediate_size")
        turns = slice(int(is_up), None, 2)
        return own, turns if layout.transposed else slice(is_up * count, (is_up + 1) * count)

    def refuse_unread(self) -> None:
        """Refuse tensors that nothing in the network takes.

        Rotary frequencies, a tied head's copy and unused multi-token prediction are no surprise.
        """
        self._files.refuse_unread(self.config)
