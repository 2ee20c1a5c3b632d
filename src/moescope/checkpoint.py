"""Any source of weights into a network, and a network into files."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.families import save_config
from moescope.files import atomic_folder
from moescope.formats.gguf.model import GgufModel, is_gguf
from moescope.formats.safetensors import WIDE, SafetensorsModel, save_tensors
from moescope.formats.source import ReadBlocks, ReadExpert, WeightSource
from moescope.model.decoder import CausalLM, without_numbers
from moescope.model.rope import RotaryEmbedding
from moescope.model.routing import Hash

ROUTER_WEIGHT = "mlp.gate.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TABLE = "tid2eid"


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
        dtype: as for `formats.safetensors.save_tensors`.
        max_shard_bytes: larger models are split into several files with an index.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    tied = model.config.tie_word_embeddings
    tensors = (
        (name, tensor)
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    )
    save_tensors(model.config, tensors, folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
    save_config(model.config, folder / "config.json")


class WeightPacker(Protocol):
    """Takes matrices from files into a form of its own, one after another.

    Attributes:
        reads_all: whether `pack` reads all that it wants, instead of finding it packed.
    """

    reads_all: bool

    def wants(self, model: CausalLM) -> set[str]:
        """Return the names of the weights that it reads itself, or that no one needs."""
        ...

    def pack(
        self,
        model: CausalLM,
        tensor: Callable[[str], Tensor],
        expert: ReadExpert,
        blocks: ReadBlocks,
    ) -> None:
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
        UserError: as for `open_checkpoint`, or a tensor is missing, unknown or of another shape,
            or a norm, a bias, a router or a matrix to be packed holds what is no number.
    """
    if isinstance(source, str | Path):
        source = open_checkpoint(Path(source))
    config, dtype = source.config, dtype or source.dtype
    model = without_numbers(config)
    shapes = {name: slot.shape for name, slot in model.state_dict().items()}
    packed: set[str] = set() if packer is None else packer.wants(model)

    def read_finite(name: str) -> Tensor:  # rounding would make numbers of what is none
        weight = source.read(name, shapes[name], None).to(device)
        refuse_if_not_finite(name, weight)
        return weight

    def read_expert(name: str, expert: int, shape: torch.Size) -> Tensor:
        weight = source.read_expert(name, expert, shape, None).to(device)
        refuse_if_not_finite(f"{name} of expert {expert}", weight)
        return weight

    unpacked = {name: shape for name, shape in shapes.items() if name not in packed}
    weights = {n: weight.to(device) for n, weight in read_weights(source, unpacked, dtype)}
    load_weights(model, weights, device)
    if packer is not None:
        packer.pack(model, read_finite, read_expert, source.blocks)
    if packer is None or packer.reads_all:
        source.refuse_unread()
    return model.eval()


def read_weights(
    source: WeightSource, shapes: dict[str, torch.Size], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an open checkpoint by the network's names, one after another.

    A tied head is left out.

    Args:
        source: an open checkpoint.
        shapes: of the tensors, by name.
        dtype: of the weights, but for those that are held in another type whatever it is.

    Raises:
        UserError: a tensor is missing or of another shape, or a norm, a bias or a router holds
            what is no number.
    """
    for name, shape in shapes.items():
        if name == HEAD and source.config.tie_word_embeddings:
            continue
        weight = source.read(name, shape, _type_of(name, dtype))
        if weight.ndim == 1 or name.endswith(ROUTER_WEIGHT):
            refuse_if_not_finite(name, weight)
        if name.endswith(TABLE):
            _refuse_unknown_experts(weight, source.config)
        yield name, weight


def load_weights(model: CausalLM, weights: dict[str, Tensor], device: str | torch.device) -> None:
    """Put weights into a network of shapes alone, and make what follows from its config."""
    model.load_state_dict(weights, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module.to(device)
        elif isinstance(module, Hash):
            module.table = Hash(model.config).table.to(device)


def write_folder(
    source: WeightSource,
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    *,
    tell: Callable[[int, int], None] | None = None,
) -> None:
    """Write a checkpoint anew as a folder that others open, with all numbers multiplied out.

    Beside config and weights it holds the tokenizer, and when a text ends. The folder appears
    whole or not at all.

    Args:
        source: read tensor by tensor.
        config: what to call its network, and whether its head is written though tied.
        folder: not there yet.
        dtype: of the weights, but for those that families keep in float32.
        tell: called with how many numbers are read, and how many there are.

    Raises:
        UserError: a tensor is missing, unknown, of another shape or not finite, `folder` is there
            already, or the disk is full.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it or choose another name")
    tokenizer = source.tokenizer()
    shapes = {
        name: slot.shape
        for name, slot in without_numbers(config).state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    total = sum(shape.numel() for shape in shapes.values())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        done = 0
        for name, shape in shapes.items():
            stored = EMBEDDING if name == HEAD and source.config.tie_word_embeddings else name
            tensor = source.read(stored, shape, _type_of(name, dtype))
            refuse_if_not_finite(name, tensor)
            yield name, tensor
            done += shape.numel()
            if tell is not None:
                tell(done, total)

    with atomic_folder(folder) as partial:
        save_tensors(config, tensors(), partial)
        source.refuse_unread()
        save_config(config, partial / "config.json", dtype)
        defaults = source.generation_defaults()
        end_ids = defaults.all_ends(config.eos_token_id, tokenizer and tokenizer.eos_id)
        replace(defaults, end_ids=end_ids).save(partial)
        if tokenizer is not None:
            tokenizer.save(partial)


def _type_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return what a tensor of a network that computes in `dtype` is held in."""
    if name.endswith(TABLE):
        return torch.int64
    return torch.float32 if name.endswith(WIDE) else dtype


def refuse_if_not_finite(name: str, weight: Tensor) -> None:
    """Refuse weights that are no numbers.

    Raises:
        UserError: some are not finite; the sentence has the tensor's name.
    """
    low, high = weight.aminmax()  # both are no number where any value is none
    if math.isfinite(low) and math.isfinite(high):
        return
    bad = int((~weight.isfinite()).sum())
    raise UserError(
        f"the tensor {name} holds values that are not finite ({bad} of {weight.numel()}); "
        "fetch the model again"
    )


def _refuse_unknown_experts(table: Tensor, config: ModelConfig) -> None:
    experts = config.required("n_routed_experts")
    if not 0 <= int(table.min()) <= int(table.max()) < experts:
        raise UserError(
            f"a table of experts by token ids (`{TABLE}`) names experts beyond {experts - 1}; the "
            "file is damaged, fetch the model again"
        )
