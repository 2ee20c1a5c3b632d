"""The formats in which the native kernels hold weights, and where each comes from.

The layout is declared once, in csrc/weight_format.h; this table says what the rest of moescope
needs to know: bits in memory, and which type of a GGUF file keeps its own numbers in which format.
"""

from dataclasses import dataclass

import torch

from moescope.config import ModelConfig


@dataclass(frozen=True)
class WeightFormat:
    """One format.

    Attributes:
        bits_per_weight: in memory, scales included but for int8's, of which a row has one.
        gguf_type: the type of a GGUF file's tensors that is held in it without rounding; for FP8
            that of safetensors, with its blocks' scales.
        quantize: whether matrices of floating point can be rounded to it.
        rounds: whether kernels round what is multiplied with it, activations, to 8 bits, and so
            what attention remembers of them to bf16.
    """

    bits_per_weight: float
    gguf_type: str | None = None
    quantize: bool = False
    rounds: bool = True


WEIGHT_FORMATS = {
    "int8": WeightFormat(8.0, quantize=True),
    "int4": WeightFormat(4.5, quantize=True),
    "bf16": WeightFormat(16.0, "BF16", quantize=True, rounds=False),
    "fp8": WeightFormat(8.25, "F8_E4M3", rounds=False),
    "f16": WeightFormat(16.0, "F16", rounds=False),
    "f32": WeightFormat(32.0, "F32", rounds=False),
    "q8_0": WeightFormat(8.5, "Q8_0"),
    "q4_0": WeightFormat(4.5, "Q4_0"),
    "q4_1": WeightFormat(5.0, "Q4_1"),
    "q5_0": WeightFormat(5.5, "Q5_0"),
    "q5_1": WeightFormat(6.0, "Q5_1"),
    "q4_k": WeightFormat(4.625, "Q4_K"),
    "q5_k": WeightFormat(5.625, "Q5_K"),
    "q6_k": WeightFormat(6.5625, "Q6_K"),
    "iq4_nl": WeightFormat(4.5, "IQ4_NL"),
    "iq4_xs": WeightFormat(4.3125, "IQ4_XS"),
    "mxfp4": WeightFormat(4.25, "MXFP4"),
}
"""By name."""

FORMATS = tuple(name for name, known in WEIGHT_FORMATS.items() if known.quantize)
"""What `--quantize` rounds to."""

BLOCK_FORMATS = {
    known.gguf_type: name for name, known in WEIGHT_FORMATS.items() if known.gguf_type is not None
}
"""The format that holds a GGUF type's own numbers, by the type's name."""

BITS_PER_WEIGHT = {name: WEIGHT_FORMATS[name].bits_per_weight for name in ("bf16", "int8", "int4")}
"""Of the formats that any model can be held in, the widest first."""


def cache_type(weight_format: str) -> torch.dtype:
    """Return the type in which attention on weights of a format keeps keys, values and latents."""
    return torch.bfloat16 if WEIGHT_FORMATS[weight_format].rounds else torch.float32


def cache_bytes(config: ModelConfig, weight_format: str) -> int:
    """Return the bytes of a number in the cache of a packed network.

    DeepSeek-V4's compressed attention is PyTorch's alone, which keeps what it computes: float32.
    """
    if config.compress_rates is not None:
        return torch.float32.itemsize
    return cache_type(weight_format).itemsize
