"""GGUF on the native kernels: the file's own numbers, of every type and in every arrangement."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import V3, network, write
from torch import Tensor

import moescope
from moescope.formats.gguf.container import GgufFile
from moescope.kernels import cpu
from moescope.kernels.blocks import Blocks, requantized
from moescope.native.decoder import NativeDecoder
from moescope.native.weight_format import BLOCK_FORMATS

pytestmark = pytest.mark.skipif(
    not cpu.available(), reason="tests/kernels/test_cpu.py says why this is fine"
)
IDS = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(0))
WIDE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
}
GROUPED: dict[str, Any] = WIDE | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": GROUPED | {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3_moe": GROUPED
    | {
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
    "deepseek_v3": V3 | WIDE | {"moe_intermediate_size": 256, "q_lora_rank": 256},
}
GGUF_TYPES = sorted(set(BLOCK_FORMATS) - {"F8_E4M3"})
ROUNDABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Types that the `gguf` library can round to."""


@pytest.fixture(scope="module", params=MODELS)
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in F32, whose rows are whole blocks of every type."""
    made = network(MODELS[request.param])
    return write(made, tmp_path_factory.mktemp(request.param) / "model.gguf")


def in_type(source: Path, path: Path, kind: str) -> Path:
    """Write a file again with its matrices in another type: real blocks, or random ones."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    generator = np.random.default_rng(0)
    for tensor in reader.tensors:
        numbers = tensor.data.reshape(tensor.shape[::-1])
        if numbers.ndim == 1 or tensor.name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(tensor.name, numbers)
            continue
        fits = numbers.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0
        held = kind if fits else "Q8_0"  # as llama.cpp does
        quantised = gguf.GGMLQuantizationType[held]
        if held in ROUNDABLE:
            data = gguf.quants.quantize(numbers, quantised)
        else:
            data = small_blocks(numbers.shape, quantised, generator)
        writer.add_tensor(tensor.name, data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SCALES_AT = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}
"""Where a block holds its f16 scales, which random bytes would make anything."""
SCALES_AT |= {"Q2_K": (80, 82), "Q3_K": (108,), "IQ3_S": (0,), "TQ1_0": (52,)}


def small_blocks(shape: tuple[int, ...], kind: Any, generator: Any) -> Any:
    """Random blocks with scales that keep a network's numbers small."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    if kind.name == "MXFP4":
        data[..., 0] = generator.integers(118, 123, data.shape[:-1])
    for at in SCALES_AT.get(kind.name, ()):
        scales = (generator.random(data.shape[:-1]) * 1e-4 + 1e-4).astype(np.float16)
        data[..., at : at + 2] = scales[..., None].view(np.uint8)
    return data.reshape(*shape[:-1], -1)


def logits(model: moescope.Model) -> Tensor:
    return model.logits(IDS)[0]


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative difference at the median token: at few, rounded activations choose other experts."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_a_file_is_computed_from_its_own_numbers(wide: Path, kind: str, tmp_path: Path) -> None:
    path = in_type(wide, tmp_path / "model.gguf", kind)
    native = moescope.load(path)
    assert isinstance(native.network.model, NativeDecoder), "no flags are needed"
    exact = moescope.load(path, backend="torch", dtype="float32")
    # What is left is the rounding of activations, which integers need and floats do not.
    bound = 1e-5 if kind in ("F32", "F16", "BF16") else 0.05
    assert difference(logits(native), logits(exact)) < bound
    int4 = moescope.load(path, quantize="int4")
    again = difference(logits(int4), logits(exact))
    assert difference(logits(native), logits(exact)) < 1.2 * again, "int4 rounds once more"


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_weights_are_the_files_to_the_last_bit(wide: Path, kind: str, tmp_path: Path) -> None:
    path = in_type(wide, tmp_path / "model.gguf", kind)
    native, file = moescope.load(path), GgufFile(path)
    head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    packed: Any = native.network.lm_head
    found = cpu.unpacked(packed.packed, (1, *file.tensors[head].shape))[0]
    assert torch.equal(found, file.read(head, torch.float32))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "IQ3_S", "TQ1_0"])
def test_other_types_are_held_as_q8_0_and_a_line_says_so(
    wide: Path, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = in_type(wide, tmp_path / "model.gguf", kind)
    native = moescope.load(path)
    said = [record.getMessage() for record in caplog.records if kind in record.getMessage()]
    assert len(said) == 1 and "Q8_0" in said[0]
    exact = moescope.load(path, backend="torch", dtype="float32")
    assert difference(logits(native), logits(exact)) < 0.05


def test_requantised_rows_keep_their_order() -> None:
    numbers = np.random.default_rng(0).standard_normal((9000, 32), dtype=np.float32)
    data = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q5_0)
    made = requantized(Blocks("Q5_0", torch.Size((9000, 32)), data), "Q8_0")
    back = gguf.quants.dequantize(made.data, gguf.GGMLQuantizationType.Q8_0)
    assert made.shape == (9000, 32)
    assert np.abs(back - numbers).max() < 0.3
