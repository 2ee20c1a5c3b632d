"""DeepSeek-V4's files: FP8 and FP4 as `transformers` multiplies them out, both ways of naming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import COMPRESSED, published
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from moescope.checkpoint import load_model, save_weights
from moescope.errors import UserError

CONFIG = DeepseekV4Config(**COMPRESSED | {"hidden_size": 64, "moe_intermediate_size": 96})
EXPERT = "model.layers.1.ffn.experts.4.w1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    published(CONFIG).save_pretrained(tmp_path)
    return tmp_path


def changed(folder: Path, **weights: Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file) | weights
    save_file({name: t for name, t in tensors.items() if t is not None}, file)


def test_fp4_experts_are_multiplied_out(folder: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    packed = torch.randint(-128, 128, (96, 32), generator=generator).to(torch.int8)
    scale = torch.exp2(torch.randint(-8, 8, (96, 2), generator=generator).float())
    stored = scale.to(torch.float8_e8m0fnu)
    changed(folder, **{f"{EXPERT}.weight": packed, f"{EXPERT}.scale": stored})
    expected = Fp8Dequantize(None)._dequantize_one(packed, stored, torch.float32)
    found = load_model(folder).model.layers[1].mlp.experts.gate_up_proj[4, :96]
    assert torch.equal(found, expected)


def test_fp8_blocks_have_scales_by_another_name(folder: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(104, 20, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.25]]).to(torch.float8_e8m0fnu)
    name = "model.layers.2.attn.wq_b"
    changed(folder, **{f"{name}.weight": weight, f"{name}.scale": scale})
    found = load_model(folder).model.layers[2].self_attn.q_b_proj.weight
    assert torch.equal(found, weight.float() * 0.25)


def test_files_are_written_by_deepseeks_names(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    save_weights(model, tmp_path / "ours")
    written: dict[str, Any] = load_file(tmp_path / "ours/model.safetensors")
    theirs = load_file(folder / "model.safetensors")
    names = {
        name.removeprefix("model.").replace("embed_tokens", "embed").replace("head.hc", "head")
        for name in theirs
    }
    assert set(written) == names
    again = load_model(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_small_parts_stay_wide_and_the_table_whole(folder: Path) -> None:
    model = load_model(folder, dtype=torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for ending in (
        "attn_hc.fn",
        "ffn_hc.scale",
        "hc_head.hc_fn",
        "sinks",
        "position_bias",
        "correction_bias",
    ):
        found = {dtype for name, dtype in types.items() if name.endswith(ending)}
        assert found == {torch.float32}, ending
    assert {types[name] for name in types if name.endswith("tid2eid")} == {torch.int64}
    assert model(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


def test_a_table_beyond_the_experts_is_refused(folder: Path) -> None:
    changed(folder, **{"model.layers.0.ffn.gate.tid2eid": torch.full((97, 3), 12)})
    with pytest.raises(UserError, match=r"experts beyond 11; the file is damaged"):
        load_model(folder)


def test_multi_token_prediction_is_left_out(folder: Path) -> None:
    changed(folder, **{"mtp.0.e_proj.weight": torch.zeros(3, 3)})
    load_model(folder)


def test_a_table_behind_a_learned_router_is_refused(folder: Path) -> None:
    CONFIG.mlp_layer_types, kept = ["moe", "hash_moe", "moe", "moe"], CONFIG.mlp_layer_types
    try:
        CONFIG.save_pretrained(folder)
    finally:
        CONFIG.mlp_layer_types = kept
    with pytest.raises(UserError, match="`hash_moe` layer behind a `moe` layer"):
        load_model(folder)
