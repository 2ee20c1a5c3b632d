import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moescope.api import Model
from moescope.checkpoint import load_model, save_weights
from moescope.errors import UserError
from moescope.families import config_fields, read_config
from moescope.formats.safetensors import WEIGHTS
from moescope.formats.weight_files import INDEX
from moescope.model.decoder import CausalLM, initialise


@pytest.fixture
def network(model: Model) -> CausalLM:
    """The small model, with a prediction depth and biases that are not zero."""
    fields = {**config_fields(model.config), "num_nextn_predict_layers": 1}
    made = CausalLM(read_config(fields))
    initialise(made, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, tensor in made.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return made


@pytest.fixture
def folder(network: CausalLM, tmp_path: Path) -> Path:
    save_weights(network, tmp_path)
    return tmp_path


def assert_same(left: CausalLM, right: CausalLM) -> None:
    assert left.config == right.config
    first, second = left.state_dict(), right.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


def rewrite(folder: Path, change: Any) -> None:
    """Apply `change` to the dictionary of tensors in the weights file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000, 1])
def test_what_was_saved_comes_back_bit_for_bit(
    network: CausalLM, tmp_path: Path, max_shard_bytes: int
) -> None:
    save_weights(network, tmp_path, max_shard_bytes=max_shard_bytes)
    assert_same(load_model(tmp_path), network)
    assert (tmp_path / INDEX).exists() == (max_shard_bytes < 10**9)


def test_an_index_names_every_tensors_shard_and_the_size_of_all(
    network: CausalLM, tmp_path: Path
) -> None:
    save_weights(network, tmp_path, max_shard_bytes=40_000)
    index = json.loads((tmp_path / INDEX).read_text())
    held = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, part in held.items() for name in part}
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in held.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) <= 40_000


@pytest.mark.parametrize("sizes", [(10**9, 40_000), (40_000, 10**9)])
def test_saving_in_another_number_of_files_leaves_no_old_ones_to_be_opened(
    model: Model, network: CausalLM, tmp_path: Path, sizes: tuple[int, int]
) -> None:
    save_weights(model.network, tmp_path, max_shard_bytes=sizes[0])
    save_weights(network, tmp_path, max_shard_bytes=sizes[1])
    assert_same(load_model(tmp_path), network)
    assert (tmp_path / INDEX).exists() != (tmp_path / WEIGHTS).exists()


def test_names_are_deepseeks(folder: Path) -> None:
    names = set(load_file(folder / WEIGHTS))
    assert {
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.experts.7.down_proj.weight",
        "model.layers.2.mlp.shared_experts.up_proj.weight",
        "model.layers.2.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.3.eh_proj.weight",
        "model.layers.3.enorm.weight",
        "model.layers.3.shared_head.norm.weight",
        "model.layers.3.mlp.experts.0.gate_proj.weight",
        "lm_head.weight",
    } <= names
    assert not any("mtp" in name or "gate_up" in name for name in names)


def test_files_can_be_read_by_others(folder: Path) -> None:
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir())


def test_weights_take_the_type_asked_for_and_the_correction_bias_stays_float32(
    folder: Path, network: CausalLM
) -> None:
    loaded = load_model(folder, dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        is_bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if is_bias else torch.bfloat16)
        assert torch.equal(tensor, network.state_dict()[name].to(tensor.dtype))


def test_bfloat16_files_are_half_the_size_and_load_as_bfloat16(
    network: CausalLM, tmp_path: Path
) -> None:
    save_weights(network, tmp_path, dtype=torch.bfloat16)
    assert load_model(tmp_path).lm_head.weight.dtype == torch.bfloat16
    weights = sum(parameter.numel() for parameter in network.parameters())
    assert (tmp_path / WEIGHTS).stat().st_size < 2.2 * weights


def test_int8_rows_come_back_within_half_a_step(network: CausalLM, tmp_path: Path) -> None:
    save_weights(network, tmp_path, dtype=torch.int8)
    loaded = load_model(tmp_path, dtype=torch.float32).state_dict()
    for name, tensor in network.state_dict().items():
        difference = (loaded[name] - tensor).abs()
        if name.endswith("e_score_correction_bias"):
            assert not difference.any()
        elif tensor.ndim == 1:
            assert float(difference.max()) <= float(tensor.abs().max()) / 256
        else:
            half_a_step = tensor.abs().amax(dim=-1, keepdim=True) / 127 / 2
            assert bool((difference <= half_a_step * 1.001 + 1e-12).all()), name


def test_tied_weights_are_written_once_and_shared_again(model: Model, tmp_path: Path) -> None:
    fields = {**config_fields(model.config), "tie_word_embeddings": True}
    tied = CausalLM(read_config(fields))
    initialise(tied, seed=0)
    save_weights(tied, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(loaded, tied)


def test_fp8_blocks_are_multiplied_out(folder: Path) -> None:
    """DeepSeek-V3's format, block by block in float64; sizes are no multiples of 128."""
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    expected: dict[str, Tensor] = {}

    def in_blocks(tensors: dict[str, Tensor]) -> None:
        for part, shape in {"gate": (300, 32), "up": (300, 32), "down": (32, 300)}.items():
            name = f"model.layers.0.mlp.{part}_proj.weight"
            weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
            blocks = [-(-size // 128) for size in shape]
            scale = torch.rand(blocks, generator=generator) + 0.1
            tensors[name], tensors[name + "_scale_inv"] = weight, scale
            expected[name] = torch.tensor(
                [
                    [
                        float(weight[row, column]) * float(scale[row // 128, column // 128])
                        for column in range(shape[1])
                    ]
                    for row in range(shape[0])
                ],
                dtype=torch.float64,
            )

    rewrite(folder, in_blocks)
    loaded = load_model(folder, dtype=torch.float32).state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(loaded[name].double(), weight, rtol=1e-6, atol=0)


def test_announced_prediction_depths_that_no_file_holds_are_left_out(folder: Path) -> None:
    """`transformers` drops them from the weights and keeps them in the config."""

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    rewrite(folder, drop)
    assert load_model(folder).mtp is None


# --- what is refused -----------------------------------------------------------------------------


def refused(folder: Path, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "there is no .*config.json; name a folder")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refused(folder, "holds no weights; moescope opens safetensors")


def test_pickles_are_never_opened(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    refused(folder, "only pickle files, which can run code")


def test_a_truncated_file_is_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refused(folder, "no intact safetensors file .*fetch the model again")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    refused(folder, r"lacks the tensor model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    refused(folder, r"model\.norm\.weight has the shape \(31,\), but config.json makes it \(32,\)")


def test_a_tensor_that_no_part_of_the_network_takes_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.1.extra": torch.ones(2)}))
    refused(folder, "holds 1 tensor that a deepseek_v3 model .* such as model.layers.1.extra")


def test_a_missing_shard_is_named(network: CausalLM, tmp_path: Path) -> None:
    save_weights(network, tmp_path, max_shard_bytes=20_000)
    next(tmp_path.glob("model-00002-*")).unlink()
    refused(tmp_path, "model-00002-of-.* is missing, though model.safetensors.index.json names it")


def test_a_damaged_index_is_refused(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": 3}')
    refused(folder, "index.json is damaged")


def test_a_full_disk_keeps_the_old_weights(
    folder: Path, network: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / WEIGHTS).read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moescope.formats.safetensors.save_file", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        save_weights(network, folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, "config.json"}


def test_the_text_part_of_a_larger_model_opens(tmp_path: Path) -> None:
    """As Kimi-K2.5 has it: a nested config, a prefix, and a part that sees pictures."""
    fields = {
        "model_type": "kimi_k2",
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    }
    made = CausalLM(read_config(fields))
    initialise(made, seed=0)
    save_weights(made, tmp_path)
    tensors = {
        f"language_model.{name}": tensor for name, tensor in load_file(tmp_path / WEIGHTS).items()
    }
    tensors["vision_tower.patch.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    config = {"model_type": "kimi_k25", "text_config": config_fields(made.config)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(load_model(tmp_path), made)
