"""Which type each tensor of a GGUF file has: llama.cpp's file types, and its mixtures by role.

Source: llama.cpp, `src/llama-quant.cpp`.
"""

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from moescope.formats.gguf.metadata import IN_LAYER

Kind = GGMLQuantizationType


@dataclass(frozen=True)
class FileType:
    """What a file's matrices are rounded to.

    Attributes:
        number: by which a file names it.
        kind: type of most matrices.
        mixed: whether values and down projections have Q6_K in half of the layers.
        experts: type of the routed experts; None for that of the others.
    """

    number: LlamaFileType
    kind: GGMLQuantizationType
    mixed: bool = False
    experts: GGMLQuantizationType | None = None

    @property
    def is_float(self) -> bool:
        """Whether it holds plain numbers, so that no role needs more bits."""
        return GGML_QUANT_SIZES[self.kind][0] == 1


FILE_TYPES = {
    "f32": FileType(LlamaFileType.ALL_F32, Kind.F32),
    "bf16": FileType(LlamaFileType.MOSTLY_BF16, Kind.BF16),
    "f16": FileType(LlamaFileType.MOSTLY_F16, Kind.F16),
    "q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, Kind.Q8_0),
    "q6_k": FileType(LlamaFileType.MOSTLY_Q6_K, Kind.Q6_K),
    "q5_k_m": FileType(LlamaFileType.MOSTLY_Q5_K_M, Kind.Q5_K, mixed=True),
    "q5_1": FileType(LlamaFileType.MOSTLY_Q5_1, Kind.Q5_1),
    "q5_0": FileType(LlamaFileType.MOSTLY_Q5_0, Kind.Q5_0),
    "q4_k_m": FileType(LlamaFileType.MOSTLY_Q4_K_M, Kind.Q4_K, mixed=True),
    "q4_1": FileType(LlamaFileType.MOSTLY_Q4_1, Kind.Q4_1),
    "q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, Kind.Q4_0),
    "iq4_nl": FileType(LlamaFileType.MOSTLY_IQ4_NL, Kind.IQ4_NL),
    "mxfp4_moe": FileType(LlamaFileType.MOSTLY_MXFP4_MOE, Kind.Q8_0, experts=Kind.MXFP4),
}
"""By llama.cpp's names, the widest first."""

NARROWER_BLOCKS = {
    Kind.Q4_K: Kind.Q5_0,
    Kind.Q5_K: Kind.Q5_1,
    Kind.Q6_K: Kind.Q8_0,
}
"""What rows get that are no whole blocks of 256 columns; without blocks of 32, F16."""

EIGHT = 8
"""Experts of the mixtures whose attention llama.cpp gives more bits, being a small part of all."""


def tensor_type(
    name: str, shape: tuple[int, ...], file_type: FileType, layers: int, experts: int, tied: bool
) -> GGMLQuantizationType:
    """Return a tensor's type.

    Args:
        name: in the file.
        shape: rows before columns.
        file_type: of the file.
        layers: of the network.
        experts: routed ones in a layer, 0 for none.
        tied: whether the embedding is the head, too.
    """
    columns = shape[-1]
    is_matrix = len(shape) > 1 and name.endswith(".weight") and "norm" not in name
    if not is_matrix or name.endswith("ffn_gate_inp.weight"):
        return Kind.F32
    kind = file_type.kind
    if not file_type.is_float:
        kind = _of_role(name, kind, file_type, layers, experts, tied)
    return _fitting(kind, columns)


def _of_role(
    name: str,
    kind: GGMLQuantizationType,
    file_type: FileType,
    layers: int,
    experts: int,
    tied: bool,
) -> GGMLQuantizationType:
    found = IN_LAYER.match(name)
    if found is None:
        is_head = name == ("token_embd.weight" if tied else "output.weight")
        return Kind.Q6_K if is_head and kind != Kind.Q8_0 else kind
    role = name[found.end() :].removesuffix(".weight").lstrip(".")
    if experts == EIGHT and role in ("attn_v", "attn_k"):
        return Kind.Q8_0
    if experts == EIGHT and role == "attn_output" and kind in (Kind.Q4_K, Kind.IQ4_NL):
        return Kind.Q5_K
    if file_type.experts is not None and role.endswith("_exps"):
        return file_type.experts
    hurts = role == "attn_v" or role.startswith("ffn_down")
    return Kind.Q6_K if file_type.mixed and hurts and _more_bits(int(found[1]), layers) else kind


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(kind: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """Return the type itself, or the next wider one whose blocks make up such a row."""
    for fitting in (kind, NARROWER_BLOCKS.get(kind, Kind.F16)):
        if columns % GGML_QUANT_SIZES[fitting][0] == 0:
            return fitting
    return Kind.F16
