"""A model as other engines open it: a folder for `transformers` or vLLM, or GGUF."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import torch

from moescope.api import DTYPES, FLOAT32_PARAMETERS
from moescope.checkpoint import open_checkpoint, write_folder
from moescope.config import ModelConfig
from moescope.errors import UserError
from moescope.families import FAMILIES, others_route_alike
from moescope.model.costs import count_parameters
from moescope.quantization import quantize

TARGETS = ("transformers", "vllm", "gguf")
GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16"}
UNKNOWN = ("deepseek",)
"""Families that `transformers`, and vLLM with it, opens only by running code from the Hub."""
VLLM_LATENT = 576
"""Width of a latent and its rotated key in DeepSeek-V2 and V3, which vLLM's MLA kernels know."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the folder or file.
        dtype: of its weights.
        bytes: of its weights.
        command: what opens it, in Python or a shell.
        note: a sentence on what must be known; None where there is nothing.
    """

    path: Path
    dtype: str
    bytes: int
    command: str
    note: str | None


def export(
    source: Path,
    to: str,
    out: Path,
    *,
    dtype: str | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write the model at `source` so that another engine opens it, whole or not at all.

    Integers and blocks are multiplied out; tokenizer, chat template and what ends a text go along.

    Args:
        source: a folder or GGUF file.
        to: one of `TARGETS`.
        out: a folder, for GGUF a file whose name ends in .gguf; not there yet.
        dtype: of the weights, as for `moescope.load`.
        tell: called with how much is done, and how much there is to do.

    Raises:
        UserError: the engine cannot compute the model as it was trained, the model has no
            tokenizer, `out` is there already, or as for `moescope.load`.
    """
    if to not in TARGETS:
        raise UserError(f"there is no engine {to!r} to export to; choose from {', '.join(TARGETS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(source)
    is_small = count_parameters(checkpoint.config).total <= FLOAT32_PARAMETERS
    wanted = DTYPES[dtype] if dtype else torch.float32 if is_small else checkpoint.dtype
    name = str(wanted).removeprefix("torch.")
    if to == "gguf":
        if out.suffix != ".gguf":
            raise UserError(f"{out} is no name of a GGUF file; let it end in .gguf")
        written = quantize(source, GGUF_TYPES[name], out, tell)
        return Exported(out, name, written.bytes, f"llama-cli -m {quote(str(out))}", None)
    config = known_to_others(checkpoint.config)
    if to == "vllm":  # its DeepSeek reads a head of its own, and computes with zeros without
        config = config.model_copy(update={"tie_word_embeddings": False})
    if checkpoint.tokenizer() is None:
        raise UserError(
            f"{source} has no tokenizer, without which no other engine takes text; put its "
            "tokenizer.json beside the weights"
        )
    write_folder(checkpoint, config, out, wanted, tell=tell)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    command, note = f'AutoModelForCausalLM.from_pretrained("{out}")', None
    if to == "vllm":
        command, note = _vllm(config, out, name)
    return Exported(out, name, size, command, note)


def known_to_others(config: ModelConfig) -> ModelConfig:
    """Return the config under the `model_type` by which others know its network.

    Raises:
        UserError: they know none, or choose experts otherwise than the model was trained to.
    """
    family = FAMILIES[config.model_type]
    if config.model_type in UNKNOWN:
        raise UserError(
            f"`transformers` and vLLM open {config.model_type} only by running code from the Hub; "
            "llama.cpp opens it as GGUF (moescope quantize)"
        )
    if not others_route_alike(config):
        raise UserError(
            f"its router (topk_method {config.topk_method!r}, scoring_func "
            f"{config.scoring_func!r}) is one that other engines do not compute for "
            f"{config.model_type}; serve it with moescope serve"
        )
    first = next(f for f in FAMILIES.values() if f.architecture == family.architecture)
    return config.model_copy(update={"model_type": first.model_type})


def _vllm(config: ModelConfig, out: Path, dtype: str) -> tuple[str, str | None]:
    command = f"vllm serve {quote(str(out))} --dtype {dtype}"
    if not config.uses_mla:
        return command, None
    width = config.required("kv_lora_rank") + config.required("qk_rope_head_dim")
    if width == VLLM_LATENT:
        return command, None
    return (
        f"VLLM_MLA_DISABLE=1 {command}",
        f"vLLM caches latents only where kv_lora_rank + qk_rope_head_dim is {VLLM_LATENT}, and "
        f"here it is {width}: with VLLM_MLA_DISABLE=1 it caches whole keys and values",
    )
