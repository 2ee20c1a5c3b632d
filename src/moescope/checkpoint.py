"""Checkpoints: safetensors as DeepSeek publishes and `transformers` reads them, in and out.

Published names are the network's own but for two things: a checkpoint holds each expert's
matrices by themselves, and multi-token-prediction depths as layers behind the last. GGUF files
are opened too (`gguf_model`); any source of weights goes through one `load_model`.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.files import atomic_path, write_text
from moescope.formats.gguf.model import GgufModel, is_gguf
from moescope.kernels.quantize import dequantize_int8, quantize_int8
from moescope.model.decoder import CausalLM, without_numbers
from moescope.model.rope import RotaryEmbedding
from moescope.model.routing import Hash
from moescope.text.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"
CORRECTION_BIAS = "e_score_correction_bias"
INT8_SCALE, FP8_SCALE = "_scale", "_scale_inv"
FP8_BLOCK = 128


def save_weights(
    model: CausalLM,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write `config.json` and the weights into `folder`, each file atomically.

    Args:
        model: what to write; tied weights are written once.
        folder: made if it is not there.
        dtype: type of the weights; None keeps each tensor's own. `torch.int8` stores matrices as
            integers with a float32 scale a row (`<name>_scale`), which moescope alone reads.
        max_shard_bytes: larger models are split into several files with an index.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    shards: list[dict[str, Tensor]] = [{}]
    held = 0  # bytes in the last of them
    for name, tensor in _published_tensors(model):
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
    model.config.save(folder / "config.json")


class WeightSource(Protocol):
    """A checkpoint, open; tensors go by the network's names.

    Attributes:
        config: the model's shape.
        dtype: to compute in unless asked otherwise.
        files: all that config and weights are read from.
    """

    config: ModelConfig
    dtype: torch.dtype
    files: list[Path]

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        """Return a tensor in `dtype`; None takes the narrower of bf16 and float32 that is exact."""
        ...

    def refuse_unread(self) -> None:
        """Refuse tensors that nothing in the network takes."""
        ...

    def tokenizer(self) -> Tokenizer:
        """Return the vocabulary."""
        ...


class WeightPacker(Protocol):
    """Takes matrices from files into a form of its own, one after another.

    Attributes:
        reads_all: whether `pack` reads all that it wants, instead of finding it packed.
    """

    reads_all: bool

    def wants(self, model: CausalLM) -> set[str]:
        """Return the names of the weights that it reads itself, or that no one needs."""
        ...

    def pack(self, model: CausalLM, read: Callable[[str], Tensor]) -> None:
        """Read those weights by name and replace the modules that they belong to."""
        ...


def open_checkpoint(path: Path) -> WeightSource:
    """Open the model at `path`, of which as yet nothing is read but headers.

    A model whose config announces multi-token prediction but whose files lack it is opened
    without.

    Args:
        path: a folder with `config.json` and safetensors, or a GGUF file.

    Raises:
        UserError: there is no config or no weights, or a file is damaged.
    """
    path = Path(path)
    return GgufModel(path) if is_gguf(path) else SafetensorsModel(path)


def load_model(
    source: Path | WeightSource,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    packer: WeightPacker | None = None,
) -> CausalLM:
    """Make the network of a checkpoint: files are memory-mapped and read tensor by tensor.

    DeepSeek's FP8 blocks, moescope's int8 rows and GGUF's blocks are multiplied out.

    Args:
        source: an open checkpoint, or what `open_checkpoint` takes.
        dtype: type that the network computes in; None takes that of the file's final norm, bf16
            for GGUF.
        device: where the weights go.
        packer: takes the matrices it wants; at no time are all of them in memory unpacked.

    Raises:
        UserError: as for `open_checkpoint`, or a tensor is missing, unknown or of another shape.
    """
    if isinstance(source, str | Path):
        source = open_checkpoint(Path(source))
    config, dtype = source.config, dtype or source.dtype
    model = without_numbers(config)
    shapes = {name: slot.shape for name, slot in model.state_dict().items()}
    packed: set[str] = set() if packer is None else packer.wants(model)

    def read(name: str) -> Tensor:
        wanted = torch.float32 if name.endswith(CORRECTION_BIAS) else dtype
        return source.read(name, shapes[name], wanted).to(device)

    weights = {
        name: read(name)
        for name in shapes
        if name not in packed and not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    model.load_state_dict(weights, strict=False, assign=True)
    model.lm_head.weight = (
        model.model.embed_tokens.weight if config.tie_word_embeddings else model.lm_head.weight
    )
    _make_fixed_buffers(model, device)
    if packer is not None:
        packer.pack(model, lambda name: source.read(name, shapes[name], None).to(device))
    if packer is None or packer.reads_all:
        source.refuse_unread()
    return model.eval()


def _make_fixed_buffers(model: CausalLM, device: str | torch.device) -> None:
    """Make what no file holds, because it follows from the config."""
    model.model.rotary_emb = RotaryEmbedding(model.config).to(device)
    for module in model.modules():
        if isinstance(module, Hash):
            module.table = Hash(model.config).table.to(device)


# --- names ---------------------------------------------------------------------------------------


def _published_tensors(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        published = _published_name(name, model.config)
        if not published.endswith((GATE_UP, DOWN)):
            yield published, tensor
            continue
        stem, kind = published.rsplit(".", 1)
        for expert, matrix in enumerate(tensor):
            if kind == "down_proj":
                yield f"{stem}.{expert}.down_proj.weight", matrix
            else:
                gate, up = matrix.chunk(2)
                yield f"{stem}.{expert}.gate_proj.weight", gate
                yield f"{stem}.{expert}.up_proj.weight", up


def _published_name(name: str, config: ModelConfig) -> str:
    """Where a tensor of the network stands in a checkpoint; stacked experts keep their name."""
    if not name.startswith("mtp.depths."):
        return name
    depth, part = name.removeprefix("mtp.depths.").split(".", 1)
    layer = f"model.layers.{config.num_hidden_layers + int(depth)}"
    if part.startswith("norm."):
        return f"{layer}.shared_head.{part}"
    return f"{layer}.{part.removeprefix('layer.')}"


# --- number formats ------------------------------------------------------------------------------


def _encode(name: str, tensor: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    if dtype is None or name.endswith(CORRECTION_BIAS):
        return {name: tensor.contiguous()}
    if dtype != torch.int8:
        return {name: tensor.to(dtype).contiguous()}
    if tensor.ndim == 1:
        return {name: tensor.to(torch.bfloat16)}
    integers, scale = quantize_int8(tensor)
    return {name: integers, name + INT8_SCALE: scale}


def _dequantize_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply out blocks of 128 x 128 with one scale each (DeepSeek-V3, section 3.3.2)."""
    rows, columns = weight.shape
    scale = scale.repeat_interleave(FP8_BLOCK, dim=0)[:rows]
    scale = scale.repeat_interleave(FP8_BLOCK, dim=1)[:, :columns]
    return (weight.float() * scale).to(dtype)


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
        config = ModelConfig.from_file(folder / "config.json")
        self._files = _WeightFiles(folder)
        if f"model.layers.{config.num_hidden_layers}.eh_proj.weight" not in self._files:
            config = config.model_copy(update={"num_nextn_predict_layers": 0})
        self.config = config
        self.dtype = self._files.dtype("model.norm.weight")
        self.files = [folder / "config.json", *self._files.paths]

    def tokenizer(self) -> Tokenizer:
        """Return the vocabulary of the folder."""
        return Tokenizer.load(self._folder)

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        """Return the tensor of the network called `name`, stacking experts where it holds several.

        Args:
            name: in the network's state dict.
            shape: that it must have.
            dtype: of the answer; None takes the narrower of bf16 and float32 that is exact.

        Raises:
            UserError: the files lack it, it has another shape, or it cannot be read.
        """
        published = _published_name(name, self.config)
        if published in self._files or not published.endswith((GATE_UP, DOWN)):
            return self._files.read(published, shape, dtype)
        stem, kind = published.rsplit(".", 1)
        parts = ("down_proj",) if kind == "down_proj" else ("gate_proj", "up_proj")
        dtype = dtype or self._files.exact(f"{stem}.0.{parts[0]}.weight")
        stacked = torch.empty(shape, dtype=dtype)
        for expert, matrix in enumerate(stacked):
            for place, part in zip(matrix.chunk(len(parts)), parts, strict=True):
                read = self._files.read(f"{stem}.{expert}.{part}.weight", place.shape, dtype)
                place.copy_(read)
        return stacked

    def refuse_unread(self) -> None:
        """Refuse tensors that nothing in the network takes.

        Rotary frequencies, a tied head's copy and unused multi-token prediction are no surprise.
        """
        self._files.refuse_unread(self.config)


class _WeightFiles:
    """All tensors of a folder by name, memory-mapped, and which of them were read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handles: dict[str, Any] = {}
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
            self._handles |= dict.fromkeys(names, handle)
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
        is_bf16 = self._get(name).dtype == torch.bfloat16
        return torch.bfloat16 if is_bf16 else torch.float32

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        """Return a tensor in `dtype`, or the exact one, multiplied out if it is quantised."""
        tensor = self._get(name)
        dtype = dtype or self.exact(name)
        if tensor.shape != shape:
            raise UserError(
                f"{self._folder}: the tensor {name} has the shape {tuple(tensor.shape)}, but "
                f"config.json makes it {tuple(shape)}; the two belong to different models"
            )
        if tensor.dtype == torch.int8 and tensor.ndim == 2:
            return dequantize_int8(tensor, self._scale(name + INT8_SCALE, (len(tensor), 1)), dtype)
        if tensor.dtype == torch.float8_e4m3fn and tensor.ndim == 2:
            blocks = tuple(-(-size // FP8_BLOCK) for size in tensor.shape)
            return _dequantize_fp8(tensor, self._scale(name + FP8_SCALE, blocks), dtype)
        if not tensor.is_floating_point():
            raise UserError(
                f"{self._folder}: the tensor {name} holds {tensor.dtype}, which is no weight "
                "that moescope reads"
            )
        return tensor.to(dtype)

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
            and not name.startswith(tuple(behind))
            and not (name == "lm_head.weight" and config.tie_word_embeddings)
        )
        if surprising:
            raise UserError(
                f"{self._folder} holds {len(surprising)} tensors that a {config.model_type} model "
                f"of this config.json does not have, such as {surprising[0]}; check that config "
                "and weights belong together"
            )

    def _get(self, name: str) -> Tensor:
        if name not in self._handles:
            raise UserError(
                f"{self._folder} lacks the tensor {name}, which its config.json calls for; the "
                "files are incomplete or belong to another model"
            )
        self._unread.discard(name)
        try:
            return self._handles[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self._folder}: the tensor {name} cannot be read ({error}); fetch the model again"
            ) from error
