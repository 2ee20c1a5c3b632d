"""FP8 and MXFP4 in safetensors: held as they are, the same numbers as multiplied out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import COMPRESSED, published
from gguf_models import V3, network
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV4Config, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import moescope
from moescope.checkpoint import open_checkpoint, save_weights
from moescope.errors import UserError
from moescope.kernels import cpu

pytestmark = pytest.mark.skipif(
    not cpu.available(), reason="tests/kernels/test_cpu.py says why this is fine"
)
IDS = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(0))
WEIGHTS = "model.safetensors"


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round as DeepSeek does: a scale for 128 x 128, such that the largest becomes 448."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    padded = torch.zeros(128 * rows, 128 * columns)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, 128, columns, 128).transpose(1, 2)
    scale = blocks.abs().amax(dim=(2, 3)).clamp(min=1e-12) / 448
    rounded = (blocks / scale[..., None, None]).transpose(1, 2).reshape(padded.shape)
    rounded = rounded[: weight.shape[0], : weight.shape[1]].contiguous()
    return rounded.to(torch.float8_e4m3fn), scale


def in_fp8(folder: Path, ending: str = "weight_scale_inv") -> Path:
    """Write a folder's projections and experts again in FP8."""
    changed: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if not name.endswith("_proj.weight") and not name.endswith("kv_a_proj_with_mqa.weight"):
            changed[name] = tensor
            continue
        changed[name], changed[name.removesuffix("weight") + ending] = to_fp8(tensor.float())
    save_file(changed, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3's network, whose widths end within blocks."""
    folder = tmp_path_factory.mktemp("fp8")
    wide: dict[str, Any] = V3 | {
        "vocab_size": 97,
        "hidden_size": 288,
        "intermediate_size": 300,
        "moe_intermediate_size": 160,
        "initializer_range": 0.1,
    }
    save_weights(network(wide), folder, dtype=torch.bfloat16)
    return in_fp8(folder)


def difference(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def test_fp8_opens_on_the_kernels_and_computes_what_it_says(fp8: Path) -> None:
    native = moescope.load(fp8)
    exact = moescope.load(fp8, backend="torch", dtype="float32")
    assert type(native.network.lm_head).__name__ == "PackedLinear", "no flags are needed"
    found, expected = native.logits(IDS)[0], exact.logits(IDS)[0]
    assert difference(found, expected) < 1e-5, "activations are not rounded"


def test_fp8_weights_are_the_files_to_the_last_bit(fp8: Path) -> None:
    native: Any = moescope.load(fp8)
    exact: Any = moescope.load(fp8, backend="torch", dtype="float32")
    layer, plain = native.network.model.layers[-1], exact.network.model.layers[-1]
    for name in ("kv_a_proj_with_mqa", "o_proj"):
        held, weight = getattr(layer.self_attn, name), getattr(plain.self_attn, name).weight
        assert torch.equal(cpu.unpacked(held.packed, (1, *weight.shape))[0], weight)
    gate, up, down = layer.mlp.experts.packed
    gate_up, expected_down = plain.mlp.experts.gate_up_proj, plain.mlp.experts.down_proj
    half = (gate_up.shape[0], gate_up.shape[1] // 2, gate_up.shape[2])
    assert torch.equal(cpu.unpacked(gate, half), gate_up[:, : half[1]])
    assert torch.equal(cpu.unpacked(up, half), gate_up[:, half[1] :])
    assert torch.equal(cpu.unpacked(down, tuple(expected_down.shape)), expected_down)
    bits = 8 * gate.matrix_bytes / (half[1] * half[2])
    assert bits < 8 + 4 * 8 * 3 / half[2] + 1e-9, "eight bits, and a scale for 128 columns"


def test_fp8_experts_are_streamed_with_the_same_numbers(
    fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole = moescope.load(fp8).logits(IDS)
    try:
        for _ in range(2):
            assert torch.equal(moescope.load(fp8, stream_experts=True).logits(IDS), whole)
    finally:
        cpu.limit_experts(0)
        for pack in fp8.glob("*.pack"):
            pack.unlink()


def test_nan_in_fp8_is_refused(fp8: Path, tmp_path: Path) -> None:
    for file in fp8.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.layers.1.self_attn.o_proj.weight"].view(torch.uint8)[3, 5] = 0x7F
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"o_proj.weight holds values that are not finite \(1 of"):
        moescope.load(tmp_path)


@pytest.fixture
def gpt_oss(tmp_path: Path) -> Path:
    """gpt-oss, its experts in MXFP4 as OpenAI publishes them."""
    config = GptOssConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    published(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape  # transformers' arrangement
        shape = experts, rows, columns // 32
        tensors[f"{name}_blocks"] = torch.randint(
            256, (*shape, 16), generator=generator, dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(
            118, 124, shape, generator=generator, dtype=torch.uint8
        )
    save_file(tensors, tmp_path / WEIGHTS)
    return tmp_path


def test_gpt_oss_is_read_as_transformers_multiplies_it_out(gpt_oss: Path) -> None:
    model = moescope.load(gpt_oss, backend="torch", dtype="float32")
    experts: Any = model.network.model.layers[1].mlp.experts
    tensors, at = load_file(gpt_oss / WEIGHTS), "model.layers.1.mlp.experts"
    parts = (tensors[f"{at}.down_proj{end}"] for end in ("_blocks", "_scales"))
    down = convert_moe_packed_tensors(*parts, dtype=torch.float32)
    assert torch.equal(experts.down_proj, down.mT)
    parts = (tensors[f"{at}.gate_up_proj{end}"] for end in ("_blocks", "_scales"))
    both = convert_moe_packed_tensors(*parts, dtype=torch.float32).mT
    assert torch.equal(experts.gate_up_proj, torch.cat([both[:, 0::2], both[:, 1::2]], dim=1))


def test_gpt_oss_keeps_its_blocks_on_the_kernels(gpt_oss: Path) -> None:
    assert open_checkpoint(gpt_oss).has_blocks
    native: Any = moescope.load(gpt_oss)
    exact: Any = moescope.load(gpt_oss, backend="torch", dtype="float32")
    held, plain = (model.network.model.layers[0].mlp.experts for model in (native, exact))
    gate, up, down = held.packed
    assert torch.equal(cpu.unpacked(gate, (4, 96, 64)), plain.gate_up_proj[:, :96])
    assert torch.equal(cpu.unpacked(up, (4, 96, 64)), plain.gate_up_proj[:, 96:])
    assert torch.equal(cpu.unpacked(down, (4, 64, 96)), plain.down_proj)
    assert 8 * down.matrix_bytes == 4.25 * 64 * 96
    assert difference(native.logits(IDS)[0], exact.logits(IDS)[0]) < 0.05


def test_deepseek_v4_keeps_its_fp4_experts(tmp_path: Path) -> None:
    config = DeepseekV4Config(**COMPRESSED | {"hidden_size": 64, "moe_intermediate_size": 96})
    published(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    generator = torch.Generator().manual_seed(2)
    for name in [name for name in tensors if ".experts." in name]:
        rows, columns = tensors[name].shape
        tensors[name] = torch.randint(-128, 128, (rows, columns // 2), generator=generator).to(
            torch.int8
        )
        scale = torch.exp2(torch.randint(-9, -3, (rows, columns // 32), generator=generator))
        tensors[name.removesuffix("weight") + "scale"] = scale.to(torch.float8_e8m0fnu)
    save_file(tensors, tmp_path / WEIGHTS)
    native: Any = moescope.load(tmp_path)
    exact: Any = moescope.load(tmp_path, backend="torch", dtype="float32")
    held, plain = (model.network.model.layers[1].mlp.experts for model in (native, exact))
    experts = plain.gate_up_proj.shape[0]
    found = torch.cat([cpu.unpacked(part, (experts, 96, 64)) for part in held.packed[:2]], dim=1)
    assert torch.equal(found, plain.gate_up_proj)
    assert torch.equal(cpu.unpacked(held.packed[2], (experts, 64, 96)), plain.down_proj)
    assert difference(native.logits(IDS)[0], exact.logits(IDS)[0]) < 0.05


def test_kernels_keep_int8_where_it_is_asked_for(fp8: Path) -> None:
    assert json.loads((fp8 / "config.json").read_text())["model_type"] == "deepseek_v3"
    rounded: Any = moescope.load(fp8, quantize="int8").network.model.layers[-1].mlp.experts
    gate, _, _ = rounded.packed
    exact: Any = moescope.load(fp8, backend="torch", dtype="float32").network.model.layers[-1]
    weight = exact.mlp.experts.gate_up_proj[:, :160]
    found = cpu.unpacked(gate, tuple(weight.shape))
    assert not torch.equal(found, weight)
    assert difference(found.flatten(1), weight.flatten(1)) < 0.02
