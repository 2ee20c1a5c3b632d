"""A network as a GGUF file, written tensor by tensor.

At no time is more than one tensor in memory. Names, layout and metadata are those that llama.cpp's
own converter gives: experts stacked, latent attention stored as multi-query attention with one
key-value head, `kv_b_proj` split into a transposed key half and a value half.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.files import atomic_path
from moescope.formats.gguf.container import TensorInfo
from moescope.formats.gguf.file_types import FILE_TYPES, FileType, tensor_type
from moescope.formats.gguf.llama3 import llama3_factors
from moescope.formats.gguf.metadata import architecture_of, metadata_of
from moescope.formats.gguf.names import PERMUTED, ROPE_FACTORS, SPLIT, stored_name
from moescope.kernels import cpu

Read = Callable[[str], Tensor]

ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokens; tokens are spelled in GPT-2's byte alphabet."""

    tokens: Sequence[str]
    merges: Sequence[str]
    types: Sequence[int]
    pre: str = "deepseek-v3"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    eot_token_id: int | None = None
    add_bos_token: bool = False
    add_eos_token: bool = False
    chat_templates: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file, and how it is made from one of the network's."""

    name: str
    source: str
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor] = field(repr=False)


def write_gguf(
    config: ModelConfig,
    shapes: Mapping[str, torch.Size],
    weights: Read,
    path: Path,
    file_type: str,
    *,
    head_type: str | None = None,
    vocabulary: Vocabulary | None = None,
    fused_kv_b: bool = False,
    fused_gate_up: bool = False,
    mixed: bool = False,
    sampling: Mapping[str, float] | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> dict[str, TensorInfo]:
    """Write the network to `path`, atomically; return what it holds, by name.

    Args:
        config: of a family that llama.cpp has an architecture for.
        shapes: of all tensors in the network's state dict.
        weights: returns the tensor of a name in the network's state dict (`CausalLM`), any
            floating type; called once or several times a name.
        path: the file.
        file_type: type of the matrices, a key of `FILE_TYPES`, or that in capitals. Norms, routers
            and biases are F32; rows that are no multiple of 32 are F16 where a type needs blocks.
        head_type: type of `output.weight`; None is `file_type`.
        vocabulary: the tokens; None spells the 256 bytes and fills up with unused ids,
            257 at least.
        fused_kv_b: whether `kv_b_proj` stays one tensor, as in files before April 2025.
        fused_gate_up: whether experts' gates and ups are one tensor, as llama.cpp can also have it.
        mixed: whether some roles have more bits, as in files that llama.cpp quantises.
        sampling: defaults of a draw, by their keys behind `general.sampling.`.
        tell: called with the bytes that are written and those of all tensors.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    made_as = FILE_TYPES[file_type.lower()]
    with atomic_path(Path(path)) as partial:
        writer = GGUFWriter(partial, architecture_of(config).architecture)
        metadata = metadata_of(config)
        if fused_kv_b:  # as such files have it: widths of a head, and as many of keys and values
            metadata = _of_heads(config, metadata)
        _add_metadata(writer, metadata)
        writer.add_file_type(made_as.number)
        _add_vocabulary(writer, vocabulary or _bytes_only(config))
        _add_metadata(writer, {f"general.sampling.{k}": v for k, v in (sampling or {}).items()})
        whole = {"attn_kv_b.weight"} if fused_kv_b else set[str]()
        whole |= {"ffn_gate_up_exps.weight", "ffn_gate_up_exps.bias"} if fused_gate_up else set()
        head_as = FILE_TYPES[(head_type or file_type).lower()]
        entries = list(_entries(config, shapes, whole))

        def kind_of(entry: _Entry) -> GGMLQuantizationType:
            if not mixed:
                return _kind(entry, head_as if entry.name == "output.weight" else made_as)
            return tensor_type(
                entry.name,
                entry.shape,
                made_as,
                config.num_hidden_layers,
                config.n_routed_experts or 0,
                config.tie_word_embeddings,
            )

        kinds = {entry.name: kind_of(entry) for entry in entries}
        factors = _rope_factors(config)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        held = {
            entry.name: add_info(writer, entry.name, entry.shape, kinds[entry.name])
            for entry in entries
        }
        refuse_if_disk_is_full(path, held)
        write_header(writer)
        if factors is not None:
            writer.write_tensor_data(factors)
        total = sum(info.size for info in held.values())
        done = 0
        for entry in entries:
            tensor = entry.make(weights(entry.source).detach())
            assert tuple(tensor.shape) == entry.shape, (entry.name, tensor.shape, entry.shape)
            writer.write_tensor_data(encode(tensor, kinds[entry.name]))
            done += held[entry.name].size
            if tell is not None:
                tell(done, total)
        writer.close()
    return held


def add_info(
    writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType
) -> TensorInfo:
    """Announce a tensor whose bytes are written later; return its shape, type and size."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    size = prod(shape) // block * size
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind)
    return TensorInfo(shape, kind.name, 0, size)


def write_header(writer: GGUFWriter) -> None:
    """Write all that stands before the tensors' bytes."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def refuse_if_disk_is_full(path: Path, held: Mapping[str, TensorInfo]) -> None:
    """Compare the tensors with the space that is free where `path` will be.

    Raises:
        UserError: they do not fit; the sentence has the sizes.
    """
    size, free = sum(info.size for info in held.values()), shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(
            f"{path} would take {size / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another folder"
        )


def _entries(
    config: ModelConfig, shapes: Mapping[str, torch.Size], whole: set[str]
) -> Iterator[_Entry]:
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim or 0

    def key_half(weight: Tensor) -> Tensor:  # (heads, rank, nope)
        return weight.unflatten(0, (heads, -1))[:, :nope].mT.contiguous()

    def value_half(weight: Tensor) -> Tensor:  # (heads, v_head_dim, rank)
        return weight.unflatten(0, (heads, -1))[:, nope:].contiguous()

    def part_of(name: str) -> Callable[[Tensor], Tensor]:
        halves = {"ffn_gate_exps": 0, "ffn_up_exps": 1}
        if name.startswith("attn_k_b"):
            return key_half
        if name.startswith("attn_v_b"):
            return value_half
        half = halves[name.partition(".")[0]]

        def of_both(weight: Tensor) -> Tensor:
            return weight.tensor_split(2, dim=1)[half]

        return of_both

    def neighbours(kv: bool) -> Callable[[Tensor], Tensor]:
        """Put the rows of rotated pairs beside each other."""
        count = config.num_key_value_heads if kv else heads

        def in_pairs(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)

        return in_pairs

    gguf_family = architecture_of(config)
    for source, shape in shapes.items():
        if source.startswith("mtp.") or (source == "lm_head.weight" and config.tie_word_embeddings):
            continue
        prefix, stored = stored_name(source, gguf_family)
        made: dict[str, Callable[[Tensor], Tensor]] = {stored: _as_it_is}
        if stored in SPLIT and stored not in whole:
            made = {name: part_of(name) for name in SPLIT[stored]}
        elif gguf_family.permuted and source.rpartition(".")[0].endswith(PERMUTED):
            made = {stored: neighbours(".k_proj" in source)}
        for name, make in made.items():
            made_shape = tuple(make(torch.empty(shape, device="meta")).shape)
            yield _Entry(prefix + name, source, made_shape, make)


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _kind(entry: _Entry, file_type: FileType) -> GGMLQuantizationType:
    if len(entry.shape) == 1 or entry.name.endswith("ffn_gate_inp.weight"):
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[file_type.kind]
    return file_type.kind if entry.shape[-1] % block == 0 else GGMLQuantizationType.F16


def encode(tensor: Tensor, kind: GGMLQuantizationType) -> NDArray[np.generic]:
    """Round to a type of the file, some rows at a time."""
    if tensor.dtype == torch.bfloat16 and kind == GGMLQuantizationType.BF16:
        return tensor.contiguous().view(torch.int16).numpy()
    rows = tensor.reshape(-1, tensor.shape[-1])
    searched = cpu.available() and gguf.GGML_QUANT_SIZES[kind][0] > 1

    def encoded(part: Tensor) -> NDArray[np.generic]:
        part = part.float().contiguous()
        if searched:
            return cpu.quantize_blocks(part, kind.name)
        return gguf.quants.quantize(part.numpy(), kind)

    return np.concatenate([encoded(part) for part in rows.split(ROWS_AT_A_TIME)])


def _of_heads(config: ModelConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{architecture_of(config).architecture}.attention."
    absent = (f"{prefix}key_length_mla", f"{prefix}value_length_mla")
    return {key: value for key, value in metadata.items() if key not in absent} | {
        f"{prefix}head_count_kv": config.num_attention_heads,
        f"{prefix}key_length": config.qk_head_dim,
        f"{prefix}value_length": config.required("v_head_dim"),
    }


def _rope_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    scaling = config.rope_scaling
    if scaling is None or scaling.type != "llama3":
        return None
    return np.array(llama3_factors(config.rotary_dim, config.rope_theta, scaling), np.float32)


def _add_metadata(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name in ("bos", "eos", "pad", "eot"):
        token_id = getattr(vocabulary, f"{name}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(vocabulary.add_bos_token)
    writer.add_add_eos_token(vocabulary.add_eos_token)
    if vocabulary.chat_templates:
        writer.add_chat_template(
            [{"name": n, "template": text} for n, text in vocabulary.chat_templates.items()]
        )


def _bytes_only(config: ModelConfig) -> Vocabulary:
    """The least that llama.cpp takes for a vocabulary of the config's size."""
    spelled = sorted(ByteLevel.alphabet())
    merged = spelled[0] + spelled[1]  # one merge, as llama.cpp refuses a file without any
    unused = [f"[unused{number}]" for number in range(config.vocab_size - 257)]
    return Vocabulary(
        tokens=[*spelled, merged, *unused],
        merges=[f"{spelled[0]} {spelled[1]}"],
        types=[TokenType.NORMAL] * 257 + [TokenType.UNUSED] * len(unused),
        eos_token_id=config.vocab_size - 1,
    )
